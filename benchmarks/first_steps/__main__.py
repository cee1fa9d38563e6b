"""What is learned of small data in the first steps? Run `python -m benchmarks.first_steps`.

Four sets of labelled texts, of one task or two, with 200 training rows of each task. MiniLM with a pooler and a new
classifier, as a recipe has it; its upper two layers are adapted by one LoRA for all tasks, or by a hyperadapter with
the defaults of ``HyperAdapterConfig``, whose tasks have a learned embedding or a description. Batches of 16, a warm-up
of 1/16 of the steps, then linear decay; mean accuracy over a set's tasks after 20, 40 and 80 steps of one run.

``--stage tune`` runs five learning rates on validation rows and a seed of its own; ``test`` runs, on test rows, the
rate that is best for an arm over all sets and steps, and a recipe's default, 2e-3; ``report`` prints the table and
writes the rows. Without --stage, all three. A row is one run, appended when it is done; what has a row is skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.common.rows import Row, append_row, environment, read_rows
from benchmarks.first_steps.report import report
from benchmarks.first_steps.runs import ARMS, LEARNED, LORA, TEXT, load_small, run_once

SETS: dict[str, tuple[str, ...]] = {
    "questions, messages": ("trec6", "sms_spam"),
    "news, newswire": ("bbc", "reuters_r8"),
    "candidates": ("trump_clinton",),
    "newsgroups": ("newsgroups20",),
}
STAGES = {"tune": "validation", "test": "test"}
"""Stage -> split of the rows to evaluate on."""
RATES = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)
DEFAULT_RATE = 2e-3
TUNING_SEED = 100
SETTINGS = ("train_rows", "rows", "measured_after")
FAST: dict[str, Any] = {"train_rows": 20, "rows": 6, "measured_after": [1, 2], "seeds": [0], "sets": ["candidates"]}


class Run(NamedTuple):
    """One run."""

    stage: str
    set: str
    seed: int
    arm: str
    rate: float


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=(*STAGES, "report"), default=(*STAGES, "report"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--train-rows", type=int, default=200, help="training rows per task")
    parser.add_argument("--rows", type=int, default=100, help="rows per task to evaluate on")
    parser.add_argument("--measured-after", type=int, nargs="+", default=[20, 40, 80], help="steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the stage test")
    parser.add_argument("--fast", action="store_true", help="one set, two steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/first_steps"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's file; by default the same")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fast:
        vars(options).update(FAST)
    for stage in options.stage:
        if stage == "report":
            report(read_rows(options.output / "rows.jsonl"), DEFAULT_RATE, options.results or options.output)
        else:
            run(stage, options)


def run(stage: str, options: argparse.Namespace) -> None:
    """Run what has no row yet of a stage; the folder of the rows is made."""
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    shared = {name: getattr(options, name) for name in SETTINGS}
    rows = checked_rows(path, shared)
    done = {Run(*(row[name] for name in Run._fields)) for row in rows}
    loaded = lru_cache(maxsize=1)(lambda name: load_small(SETS[name], STAGES[stage], options.train_rows, options.rows))
    for one in runs_of(stage, options, rows):
        if one not in done:
            row = run_once(one.arm, loaded(one.set), one.rate, one.seed, options.measured_after)
            append_row(path, one._asdict() | row | shared | environment())
            print(*one, row["accuracies"], f"{row['cpu_seconds']} CPU seconds", flush=True)


def runs_of(stage: str, options: argparse.Namespace, rows: Sequence[Row]) -> list[Run]:
    """All runs of a stage, a set after the other."""
    if stage == "tune":
        return [
            Run(stage, name, TUNING_SEED, arm, rate)
            for name in options.sets
            for arm in (LORA, LEARNED)
            for rate in RATES
        ]
    return [
        Run(stage, name, seed, arm, rate)
        for name in options.sets
        for seed in options.seeds
        for arm in ARMS
        for rate in dict.fromkeys((DEFAULT_RATE, best_rate(arm, options.sets, rows)))
    ]


def best_rate(arm: str, sets: Sequence[str], rows: Sequence[Row]) -> float:
    """The rate with the best mean accuracy over all sets and steps; with descriptions, that of learned embeddings."""
    arm = LEARNED if arm == TEXT else arm
    found: dict[float, list[float]] = {rate: [] for rate in RATES}
    for row in rows:
        if (row["stage"], row["arm"]) == ("tune", arm):
            found[row["rate"]].append(fmean(fmean(values) for values in row["accuracies"].values()))
    if missing := [rate for rate, values in found.items() if len(values) < len(sets)]:
        raise SystemExit(f"{arm} has not been tuned at the rates {missing}. Run --stage tune first.")
    return max(found, key=lambda rate: fmean(found[rate]))


def checked_rows(path: Path, shared: Row) -> list[Row]:
    """The rows, which must have these settings."""
    rows = read_rows(path)
    for row in rows:
        for name, value in shared.items():
            if row[name] != value:
                raise SystemExit(f"{path} has rows with {name}={row[name]}, not {value}. Choose another --output.")
    return rows


if __name__ == "__main__":
    main()
