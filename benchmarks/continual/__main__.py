"""What happens to known tasks when a new one arrives? Run `python -m benchmarks.continual`.

MiniLM, which scores class names, learns five classification tasks at once, and then a sixth one. Which one that is
changes with the seed. The upper three layers are adapted: by a hyperadapter with the defaults of
``HyperAdapterConfig``, or by one LoRA with as many parameters. The arms are the ways on from there, see ``ARMS`` in
``benchmarks/continual/arms.py``. All that are trained see equally many rows, and each is trained at two learning rates:
that of the start, and a quarter of it.

A row is one run (seed, arm, rate), appended to ``rows.jsonl`` when it is done. What has a row is skipped. ``--report``
reads the rows and prints the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.rows import append_row, environment, read_rows
from benchmarks.continual.arms import ARMS, Start, run_arm
from benchmarks.continual.report import report
from benchmarks.multitask.data import MultitaskData

# The new task of seed 0, of seed 1, ... The last one is always known.
TASKS = ("trec6", "stereoset_rel", "movie_sent", "bbc", "reuters_r8", "sms_spam")
SETTINGS = ("tasks", "start_steps", "steps", "train_rows", "test_rows")
FAST: dict[str, Any] = {
    "tasks": ["stereoset_rel", "movie_sent", "sms_spam"],
    "start_steps": 2,
    "steps": 2,
    "train_rows": 8,
    "test_rows": 2,
    "seeds": [0],
}


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="by seed the one that comes later")
    parser.add_argument("--start-steps", type=int, default=150, help="steps on the known tasks together")
    parser.add_argument("--steps", type=int, default=50, help="steps on the new task")
    parser.add_argument("--train-rows", type=int, default=128, help="training rows per task")
    parser.add_argument("--test-rows", type=int, default=100, help="test rows per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", action="store_true", help="only read the rows and print")
    parser.add_argument("--fast", action="store_true", help="three tasks, two steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/continual_benchmark"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's file; by default the same")
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    if not options.report:
        run(options)
    report(read_rows(options.output / "rows.jsonl"), options.results or options.output)


def run(options: argparse.Namespace) -> None:
    """Run what has no row yet; a seed is complete before the next one begins.

    Args:
        options: The command's options; rows go to the folder ``output``, which is made.
    """
    shared = {name: getattr(options, name) for name in SETTINGS}
    path = options.output / "rows.jsonl"
    done = _done(path, shared)
    data = MultitaskData(options.tasks, train_rows=options.train_rows, validation_rows=1, test_rows=options.test_rows)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        start = Start(data, options, seed)
        for name, arm in ARMS.items():
            for rate in arm.rates:
                if (seed, name, rate) in done:
                    continue
                row = {"seed": seed, "arm": name, "rate": rate, **run_arm(start, arm, rate), **shared, **environment()}
                append_row(path, row)
                print(*(f"{key} {row[key]}" for key in ("seed", "arm", "rate", "new", "seconds")), flush=True)


def _done(path: Path, shared: dict[str, Any]) -> set[tuple[int, str, float]]:
    """What has a row: seed, arm and rate."""
    rows = read_rows(path)
    for row in rows:
        for name, value in shared.items():
            if row[name] != value:
                raise SystemExit(f"{path} has rows with {name}={row[name]}, not {value}. Choose another --output.")
    return {(row["seed"], row["arm"], row["rate"]) for row in rows}


if __name__ == "__main__":
    main()
