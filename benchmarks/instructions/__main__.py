"""New instructions by description, where the prompt has none: `python -m benchmarks.instructions`.

Operations on short texts (the third word, capital letters, in brackets, as JSON, the number of words, a field of a
record, ...), alone and in pairs, are some 1,150 tasks, each with six wordings. The prompt is the text alone, so that
every text has as many answers as there are tasks. More than 200 tasks are held out: pairs of trained operations,
operations with a new argument, and whole operations; others to choose learning rates on. Of what is trained, two
wordings are not.

The upper ten layers of SmolLM2-135M are adapted; the lower ones are frozen, and computed once for all runs. An answer
is right if greedy generation gives it to the letter and ends there: the turn, or the line where nothing is trained. The
arms:

- hyperadapter: the description makes the adapter. A trained one is asked by true descriptions and by wrong ones: of
  another held-out task of the same kind (shuffled), blank, an unrelated sentence, and that of the nearest trained task.
- hyperadapter, whitened: the same, whose descriptions' vectors vary in all directions alike; and trained for twice the
  steps, in about the time that the next one is trained.
- lora, told: one LoRA for all tasks, and the description stands before the text.
- lora: one LoRA for all tasks, which are not told.
- base model, told: nothing is trained.

Others see some examples of a held-out task, on a few of these: the base model in its prompt; a LoRA that is trained on
them, a fresh one or the one that a trained hyperadapter makes of the description; and a hyperadapter that reads
examples in place of descriptions, which takes one forward pass.

``--stage tune`` runs the learning rates on the validation tasks, ``ablate`` some changes of the hyperadapter there,
``test`` the arms on the test tasks, ``curve`` the hyperadapter with fewer trained tasks, ``shots`` what examples do;
``report`` prints the tables, writes the rows and draws. Without --stage, all in order. Each run is a row, appended when
it is done; runs with a row are skipped.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.rows import Row
from benchmarks.instructions.arms import ARMS, VARIANTS
from benchmarks.instructions.data import InstructionData, Size, load_data
from benchmarks.instructions.evaluation import Amount
from benchmarks.instructions.plan import ALL, OURS, STAGES, Run, Settings, Study
from benchmarks.instructions.report import report
from benchmarks.instructions.runs import run_once
from benchmarks.instructions.shots import FRESH, ShotRun, Shots
from benchmarks.instructions.tasks import subset

FAST = Settings(
    size=Size(train=6, cached=6, held_out=6, trained=1, frozen_layers=28, tasks=6),
    amount=Amount(steps=2, tasks=2, held_out=2),
    choosing=Amount(steps=1, tasks=2, held_out=2),
    arms={arm: rates[: 2 if arm == OURS else 1] for arm, rates in Settings().arms.items()},
    shots=Shots(counts=(1, 2), tasks=1, steps=1, rows=2),
    choosing_shots=Shots(counts=(1,), tasks=1, steps=1, rows=2),
    shot_arms={arm: rates[: 2 if arm == FRESH else 1] for arm, rates in Settings().shot_arms.items()},
    variants=("width 16",),
    seeds=(1,),
    curve=(4,),
)


def main() -> None:
    """Run what is missing of the stages, as long as there is time."""
    options = parse_options()
    torch.set_num_threads(1)
    study = Study(options.output, FAST if options.fast else Settings(), options.rate)
    deadline = time.monotonic() + 60 * options.minutes
    data: InstructionData | None = None
    for stage in options.stage or (*STAGES, "report"):
        if stage == "report":
            report(study, options.results or options.output)
            continue
        arms = options.arm or [*study.settings.arms, *study.settings.shot_arms]
        missing = study.missing(study.runs(stage, arms, options.seeds or study.settings.seeds))
        if not missing:
            continue
        data = data or load_data(study.settings.size, options.output)
        if not study.go_on(missing, partial(run_arm, study, data), deadline):
            return


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=(*STAGES, "report"))
    parser.add_argument("--arm", nargs="+", choices=[*Settings().arms, *Settings().shot_arms], help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the stages test, curve and shots")
    parser.add_argument("--rate", type=float, help="instead of those that the stage tune chose")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--fast", action="store_true", help="few tasks and a few steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/instructions"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the same")
    return parser.parse_args()


def run_arm(study: Study, data: InstructionData, run: Run) -> Row:
    """What a run measures."""
    settings = study.settings
    is_choosing = run.stage in ("tune", "ablate")
    role, amount = ("validation", settings.choosing) if is_choosing else ("test", settings.amount)
    if run.arm in settings.shot_arms:
        shots = settings.choosing_shots if is_choosing else settings.shots
        return ShotRun(data, run.rate, study.rate(OURS), run.seed, amount, shots, study.folder).measured(run.arm, role)
    tasks = data.tasks["train"] if run.tasks == ALL else subset(data.tasks["train"], run.tasks)
    measured = run_once((ARMS | VARIANTS)[run.arm], data, tasks, role, run.rate, run.seed, amount, study.folder)
    return {"trained_tasks": len(tasks)} | measured


if __name__ == "__main__":
    main()
