"""Results of runs of an example that differ in their seed alone."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t

Results = Mapping[str, Mapping[str, float]]


def print_over_seeds(options: argparse.Namespace, results: Results) -> None:
    """Keep a run's results in ``seeds.jsonl`` of its folder, and print the means over all seeds of its settings there.

    Args:
        options: The run's options: `output`, `seed`, and others, which are its settings. A run of the same seed and
            settings is replaced.
        results: Row of the table -> column -> number.
    """
    path = options.output / "seeds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "seed", "fast")}
    new = {"seed": options.seed, "settings": settings, "results": results}
    runs: list[dict[str, Any]] = [json.loads(line) for line in lines]
    runs = [run for run in runs if (run["seed"], run["settings"]) != (options.seed, settings)] + [new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    alike = [run["results"] for run in runs if run["settings"] == settings]
    columns = list(next(iter(results.values())))
    print(
        f"\n| over {len(alike)} seed{'s' * (len(alike) > 1)} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
    )
    for row in results:
        print(f"| {row} | " + " | ".join(_cell([run[row][column] for run in alike]) for column in columns) + " |")


def _cell(values: Sequence[float]) -> str:
    """Mean and half the width of its 95% t interval, which one value has none of."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count):.2f}"
