"""Is one hypernetwork as good as N LoRAs? Run `python -m benchmarks.multitask`.

MiniLM, which scores class names, is adapted to 14 classification tasks at rank 8, in all linear layers of its upper
three layers. Arms: a LoRA for each task; one LoRA on all of them, at the same rank and at a larger one; PEFT's Poly; a
hypernetwork in HyperFormer's style (torch's own start, no normalisation); and hyperadapters of several normalisations,
heads and sizes. (portallib adapts decoders only, and needs an older huggingface_hub.)

All arms see equally many rows: N LoRAs share the steps. Each arm's learning rate is chosen out of four by validation
accuracy, with all training rows and a seed of its own; it stays where there are fewer rows. The main arms are trained
with 1/8, 1/2 and all of the training rows, the others with all.

A row is one run (seed, fraction, arm), appended to ``rows.jsonl`` when it is done; runs of the choice of rates go to
``tuning.jsonl``. What has a row is skipped, and several processes may share the seeds after one has chosen the rates.
``--report`` reads the rows, prints the tables, and writes ``multitask.jsonl`` and the plot.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.common.rows import append_row, environment, read_rows
from benchmarks.multitask.arms import ARMS, run_arm
from benchmarks.multitask.data import MultitaskData
from benchmarks.multitask.report import report
from examples.support.text_tasks import TASK_NAMES

FRACTIONS = (1.0, 0.5, 0.125)
MAIN_ARMS = ("separate loras", "shared lora", "poly", "none", "soft_frobenius", "soft_frobenius, dim 16, gated")
TUNING_SEED = 100
FAST: dict[str, Any] = {
    "steps": 4,
    "train_rows": 8,
    "validation_rows": 2,
    "test_rows": 2,
    "tasks": ["sms_spam", "movie_sent"],
    "seeds": [0, 1],
    "fractions": [1.0, 0.5],
    "arms": ["separate loras", "shared lora", "poly", "soft_frobenius"],
}

Row = dict[str, Any]


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps over all tasks")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES))
    parser.add_argument("--train-rows", type=int, default=640, help="training rows per task")
    parser.add_argument("--validation-rows", type=int, default=60, help="validation rows per task")
    parser.add_argument("--test-rows", type=int, default=250, help="test rows per task")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="only read the rows, print and plot")
    parser.add_argument("--fast", action="store_true", help="two tasks, four arms, four steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/multitask_benchmark"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the same")
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    if not options.report:
        run(options)
    report(
        read_rows(options.output / "rows.jsonl"),
        read_rows(options.output / "tuning.jsonl"),
        options.results or options.output,
    )


def run(options: argparse.Namespace) -> None:
    """Choose learning rates, then run what has no row yet; a seed is complete before the next one begins.

    Args:
        options: The command's options; rows go to the folder ``output``, which is made.
    """
    names = ("steps", "train_rows", "validation_rows", "test_rows")
    shared = {name: getattr(options, name) for name in names} | {"tasks": len(options.tasks)}
    data = MultitaskData(
        options.tasks,
        train_rows=options.train_rows,
        validation_rows=options.validation_rows,
        test_rows=options.test_rows,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    rates = choose_rates(options, data, shared)
    path = options.output / "rows.jsonl"
    done = _done(path, shared, "seed", "fraction", "arm")
    for seed, fraction, name in itertools.product(options.seeds, options.fractions, options.arms):
        if (seed, fraction, name) in done or (fraction < 1 and name not in MAIN_ARMS):
            continue
        row = {"seed": seed, "fraction": fraction, "arm": name, "rate": rates[name]}
        _append(path, data, row, shared, options.steps, split="test")


def choose_rates(options: argparse.Namespace, data: MultitaskData, shared: Row) -> dict[str, float]:
    """Train every arm at each of its learning rates, with all rows.

    Args:
        options: The command's options.
        data: The data.
        shared: Settings that all rows have.

    Returns:
        Arm -> the rate with the highest mean validation accuracy, the smaller of two as good.
    """
    path = options.output / "tuning.jsonl"
    done = _done(path, shared, "arm", "rate")
    for name in options.arms:
        for rate in ARMS[name].rates:
            if (name, rate) not in done:
                row = {"seed": TUNING_SEED, "fraction": 1.0, "arm": name, "rate": rate}
                _append(path, data, row, shared, options.steps, split="validation")
    best: dict[str, Row] = {}
    for row in sorted(read_rows(path), key=lambda row: row["rate"]):
        if row["arm"] not in best or row["accuracy"] > best[row["arm"]]["accuracy"]:
            best[row["arm"]] = row
    return {name: row["rate"] for name, row in best.items()}


def _append(path: Path, data: MultitaskData, row: Row, shared: Row, steps: int, split: str) -> None:
    """Run, and append what was measured."""
    settings = {"fraction": row["fraction"], "rate": row["rate"], "seed": row["seed"]}
    row = {**row, **run_arm(ARMS[row["arm"]], data, steps=steps, split=split, **settings), **shared, **environment()}
    append_row(path, row)
    print(
        split, *(f"{key} {row[key]}" for key in ("seed", "fraction", "arm", "rate", "accuracy", "seconds")), flush=True
    )


def _done(path: Path, shared: Row, *names: str) -> set[tuple[Any, ...]]:
    """What has a row, told by some of its values."""
    rows = read_rows(path)
    for row in rows:
        for name, value in shared.items():
            if row[name] != value:
                raise SystemExit(f"{path} has rows with {name}={row[name]}, not {value}. Choose another --output.")
    return {tuple(row[name] for name in names) for row in rows}


if __name__ == "__main__":
    main()
