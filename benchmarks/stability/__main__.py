"""Which learning rates each way to train survives: `python -m benchmarks.stability`.

Small models are adapted at rank 8, at learning rates half a decade apart. The arms are what a user can choose between
(``arms``), the settings what normalisation must survive (``settings``). All arms see the same
batches of a seed, and AdamW's rate rises over the first 5% of the steps and then falls to zero.

``--stage choose`` runs every candidate of every arm (a weight decay, a bound) on seeds 0 to 4 and validation rows.
``--stage decide`` writes down the choices, from the setting "today". ``--stage blind`` runs what was chosen on seeds 10
to 14 and test rows, and is refused before that. ``--stage report`` prints the tables and writes the
rows of both stages, and draws the blind ones. Without --stage, all four in order.

Each run is a row, appended to a file of its setting when it is done. Runs with a row are skipped, so a study can be
stopped at any time, by --minutes cleanly, and goes on where it was; several processes may share the seeds. A run

- has diverged if its loss, its gradient or a matrix decomposition fails to be finite (it stops there), or if its final
  loss is above the base model's, where it started;
- spikes at a step whose loss is above twice the median of the ten before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from pathlib import Path

import torch

from benchmarks.common.rows import append_row, environment
from benchmarks.stability.arms import ARMS
from benchmarks.stability.data import load_data
from benchmarks.stability.plan import Study, seconds_of
from benchmarks.stability.report import report
from benchmarks.stability.runs import run_once
from benchmarks.stability.settings import HOME, SETTINGS, STAGES, fast

FAST_ARMS = ("lora", "lora + weight decay", "soft_polar")
CHORES = ("choose", "decide", "blind", "report")


def main() -> None:
    """Run what is missing of the stages, as long as there is time."""
    options = parse_options()
    torch.set_num_threads(1)
    settings, arms = SETTINGS, options.arm or list(ARMS)
    if options.fast:
        settings = {name: fast(setting) for name, setting in SETTINGS.items()}
        arms = options.arm or list(FAST_ARMS)
    study = Study(options.output, settings, arms)
    deadline = time.monotonic() + 60 * options.minutes
    for chore in options.stage or CHORES:
        if chore == "decide":
            study.decide()
        elif chore == "report":
            report(study, options.results or options.output)
        else:
            # Choices are made in one setting, and others run on validation rows only if asked to.
            names = options.setting if options.stage or chore == "blind" else None
            for name in names or [HOME]:
                if not run(study, name, chore, options.seeds, deadline):
                    return


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=CHORES)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, help=f"by default {HOME}")
    parser.add_argument("--arm", nargs="+", choices=ARMS, help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the stage's seeds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--fast", action="store_true", help="three arms, two rates, one seed, three steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/stability"), help="folder of rows and choices")
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the same")
    return parser.parse_args()


def run(study: Study, name: str, stage: str, seeds: Sequence[int] | None, deadline: float) -> bool:
    """Run what has no row yet of a setting and stage, a seed after the other; False if the time was up before."""
    setting = study.settings[name]
    runs = [run for run in study.missing(name, stage) if seeds is None or run.seed in seeds]
    if runs and not setting.can_run:
        print(f"{name}: left out, its base model is not installed (examples/requirements.txt)")
        return True
    shared = environment() | {"setting": name, "stage": stage, "definition": setting.definition}
    durations = study.durations(name)
    loaded = cache(partial(load_data, setting, STAGES[stage].split))
    # Seeds come one after the other.
    batches = lru_cache(maxsize=1)(lambda seed: loaded().training_batches(setting, seed))
    for index, one in enumerate(runs):
        seconds = seconds_of(runs[index:], durations)
        left = f"{len(runs) - index} runs are left" + ("" if seconds is None else f", {seconds / 60:.1f} minutes")
        print(f"{name}, {stage}: {left}", flush=True)
        if time.monotonic() + (seconds_of([one], durations) or 0.0) > deadline:
            print("stopped: the time is up")
            return False
        measured = run_once(ARMS[one.arm][one.candidate], setting, loaded(), batches(one.seed), one.rate, one.seed)
        row = one._asdict() | measured | shared
        append_row(study.path(name), row)
        durations[one.arm].append(row["seconds"])
        print(*(f"{key} {row[key]}" for key in (*one._fields, "accuracy", "loss", "seconds")), flush=True)
    return True


if __name__ == "__main__":
    main()
