"""Which learning rates each normalisation and each alternative survives: `python -m benchmarks.stability`.

MiniLM, which scores class names, is adapted on five tasks at once, at learning rates over five decades: query and value
of its upper three layers, at rank 8. Arms are plain LoRA; the hypernetwork without normalisation, alone and with what
else is said to help (gradient clipping, weight norm of its heads, other starts); every normalisation with its defaults;
and some of them with a deep hypernetwork, a wide one, and one of width 64 without a gate. All arms see the same batches
of a seed, and have AdamW without weight decay, whose rate rises over the first 5% of the steps and then falls to zero,
as Trainer's does by default.

A row is one run (seed, arm, rate), appended to ``rows.jsonl`` when it is done. Runs with a row are skipped, and several
processes may share the seeds. A run

- has diverged if its loss, its gradient or a matrix decomposition fails to be finite (it stops there), or if its
  validation loss ends above the base model's, where it started;
- spikes at a step whose loss is above twice the median of the ten before it;
- reaches a loss of 0.6 at the first step with a mean below it over ten steps.

``--report`` reads the rows of the seeds, prints the tables, and writes ``stability.jsonl`` and the plot.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.rows import append_row, environment, read_rows
from benchmarks.stability_arms import ARMS
from benchmarks.stability_report import report
from benchmarks.stability_runs import StabilityData, run_once

RATES = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(-8, 3))
FAST: dict[str, Any] = {
    "steps": 3,
    "validation_rows": 4,
    "seeds": [0],
    "rates": [1e-3, 1e-2],
    "arms": ["lora", "soft_frobenius"],
}


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--validation-rows", type=int, default=100, help="validation rows per task")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="only read the rows, print and plot")
    parser.add_argument("--fast", action="store_true", help="two arms, two rates, three steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/stability"), help="folder of rows.jsonl")
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the same")
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    rows_file = options.output / "rows.jsonl"
    if not options.report:
        run(options, rows_file)
    rows = [row for row in read_rows(rows_file) if row["seed"] in options.seeds]
    report(rows, options.results or options.output)


def run(options: argparse.Namespace, path: Path) -> None:
    """Run what has no row yet; a seed is complete before the next one begins.

    Args:
        options: The command's options.
        path: The file to append rows to; its folder is made.

    Raises:
        SystemExit: If the file has rows of other settings.
    """
    settings = {"steps": options.steps, "validation_rows": options.validation_rows}
    done = set()
    for row in read_rows(path):
        for name, value in settings.items():
            if row[name] != value:
                raise SystemExit(f"{path} has rows with {name}={row[name]}, not {value}. Choose another --output.")
        done.add((row["seed"], row["arm"], row["rate"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    shared, data = environment() | settings, StabilityData(options.validation_rows)
    for seed in options.seeds:
        training = data.training_batches(options.steps, seed)
        for name, rate in itertools.product(options.arms, options.rates):
            if (seed, name, rate) in done:
                continue
            row = {
                "seed": seed,
                "arm": name,
                "rate": rate,
                **run_once(ARMS[name], data, training, rate, seed),
                **shared,
            }
            append_row(path, row)
            print(*(f"{key} {row[key]}" for key in ("seed", "arm", "rate", "accuracy", "loss", "seconds")), flush=True)


if __name__ == "__main__":
    main()
