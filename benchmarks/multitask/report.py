"""Tables and plot of the multi-task benchmark's rows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.common.plots import save_plot
from benchmarks.common.rows import write_rows
from benchmarks.common.seeds import interval, shown

REFERENCE = "separate loras"
# Each answers a question that the table, whose references are LoRAs, leaves open.
PAIRS = (
    ("soft_frobenius, dim 16, gated", "shared lora, r=32"),
    ("soft_frobenius, dim 16, gated", "poly"),
    ("soft_frobenius, dim 16, gated", "soft_frobenius, dim 16"),
    ("soft_frobenius, gated", "soft_frobenius"),
    ("soft_frobenius, row, gated", "soft_frobenius, row"),
    ("soft_frobenius, dim 16, gated", "soft_frobenius, gated"),
    ("soft_frobenius, dim 16", "soft_frobenius"),
    ("soft_frobenius, pair", "soft_frobenius"),
    ("soft_frobenius, row", "soft_frobenius"),
    ("soft_frobenius", "none"),
    ("soft_frobenius, dim 16, gated", "none, dim 16, gated"),
    ("whitening", "none"),
    ("frobenius", "none"),
    ("none", "hyperformer style"),
)
# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {
    "separate loras": "#000000",
    "shared lora": "#E69F00",
    "poly": "#CC79A7",
    "none": "#56B4E9",
    "soft_frobenius": "#0072B2",
    "soft_frobenius, dim 16, gated": "#009E73",
}
# Name and width; "share" is of the parameters of separate LoRAs.
COLUMNS = {
    "accuracy": 16,
    "minus separate": 17,
    "minus shared": 17,
    "rate": 8,
    "parameters": 12,
    "share": 7,
    "MB": 7,
    "seconds": 9,
    "seeds": 7,
}

Row = dict[str, Any]
Cells = dict[float, dict[str, list[Row]]]


def report(rows: Sequence[Row], tuning: Sequence[Row], folder: Path) -> None:
    """Print the tables and write ``multitask.jsonl`` and ``multitask.svg``.

    Args:
        rows: The rows.
        tuning: The rows of the choice of learning rates.
        folder: Where the files go; it is made.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows=[]: there is nothing to report yet. Run the benchmark without --report first.")
    folder.mkdir(parents=True, exist_ok=True)
    cells = by_fraction(rows)
    print("validation accuracy by learning rate")
    for arm in dict.fromkeys(row["arm"] for row in tuning):
        tried = sorted((row["rate"], row["accuracy"]) for row in tuning if row["arm"] == arm)
        print(f"{arm:<30}" + "".join(f"{rate:>10g}: {accuracy:.3f}" for rate, accuracy in tried))
    for fraction, arms in cells.items():
        _print_arms(fraction, arms)
    _print_pairs(cells[max(cells)])
    _print_tasks(cells[max(cells)])
    write_rows(folder / "multitask.jsonl", [*tuning, *rows])
    _plot(cells, folder)


def complete_seeds(rows: Sequence[Row]) -> list[Row]:
    """Rows of the seeds that have the most, since others are still running."""
    counts = Counter(row["seed"] for row in rows)
    return [row for row in rows if counts[row["seed"]] == max(counts.values())]


def by_fraction(rows: Sequence[Row]) -> Cells:
    """Sort the rows of the seeds that have the most, since others are still running.

    Args:
        rows: Rows.

    Returns:
        Fraction of the training rows, decreasing -> arm -> its rows by seed.
    """
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for row in sorted(complete_seeds(rows), key=lambda row: (-row["fraction"], row["seed"])):
        cells[row["fraction"]][row["arm"]].append(row)
    return {fraction: dict(arms) for fraction, arms in cells.items()}


def differences(arms: dict[str, list[Row]], arm: str, reference: str) -> list[float]:
    """Mean accuracy of an arm minus that of another.

    Args:
        arms: Arm -> rows.
        arm: The arm.
        reference: The other arm.

    Returns:
        One difference for each seed that both have.
    """
    others = {row["seed"]: row["accuracy"] for row in arms.get(reference, [])}
    return [row["accuracy"] - others[row["seed"]] for row in arms[arm] if row["seed"] in others]


def _print_arms(fraction: float, arms: dict[str, list[Row]]) -> None:
    print(f"\n{fraction:.4g} of the training rows: mean test accuracy with 95% interval over seeds")
    print(f"{'arm':<30}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    for arm, rows in sorted(arms.items(), key=lambda item: -fmean(row["accuracy"] for row in item[1])):
        separate = fmean(row["parameters"] for row in arms.get(REFERENCE, [])) if REFERENCE in arms else math.nan
        cells = [
            shown(*interval([row["accuracy"] for row in rows])),
            *(shown(*interval(differences(arms, arm, other)), sign="+") for other in (REFERENCE, "shared lora")),
            f"{rows[0]['rate']:g}",
            f"{rows[0]['parameters']:,}",
            f"{rows[0]['parameters'] / separate:.3f}",
            f"{rows[0]['file_bytes'] / 1e6:.2f}",
            f"{fmean(row['seconds'] for row in rows):.0f}",
            str(len(rows)),
        ]
        print(f"{arm:<30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)))


def _print_pairs(arms: dict[str, list[Row]]) -> None:
    print("\nmean test accuracy of one arm minus that of another, with all training rows, paired by seed")
    for arm, other in PAIRS:
        if arm in arms and other in arms:
            print(f"{arm:<30} minus {other:<30}{shown(*interval(differences(arms, arm, other)), sign='+'):>16}")


def _print_tasks(arms: dict[str, list[Row]]) -> None:
    print("\nmean test accuracy in percent by task, with all training rows")
    names = list(next(iter(arms.values()))[0]["accuracies"])
    print(f"{'task':<18}" + "".join(f"{index:>7}" for index, _ in enumerate(arms)))
    for name in names:
        means = (100 * fmean(row["accuracies"][name] for row in rows) for rows in arms.values())
        print(f"{name:<18}" + "".join(f"{mean:>7.1f}" for mean in means))
    print("columns: " + "; ".join(f"{index} {arm}" for index, arm in enumerate(arms)))


def _plot(cells: Cells, folder: Path) -> None:
    figure = Figure(figsize=(9, 11), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _plot_sizes(upper, cells[max(cells)])
    _plot_fractions(lower, cells)
    save_plot(figure, folder / "multitask.svg")
    print(f"\nplot: {folder / 'multitask.svg'}")


def _plot_sizes(axes: Axes, arms: dict[str, list[Row]]) -> None:
    intervals = {arm: interval([row["accuracy"] for row in rows]) for arm, rows in arms.items()}
    means = [mean for mean, _ in intervals.values()]
    line = 0.065 * (max(means) - min(means))
    named: list[tuple[float, float]] = []
    for arm, (mean, half) in sorted(intervals.items(), key=lambda item: -item[1][0]):
        size, color = arms[arm][0]["parameters"], COLORS.get(arm, "#999999")
        axes.errorbar(size, mean, np.nan_to_num(half), fmt="o", capsize=3, color=color)
        # Below the names that are near.
        height = min(
            [mean, *(other - line for place, other in named if 0.6 < place / size < 1.6 and other < mean + line)]
        )
        named.append((size, height))
        axes.annotate(arm, (size, height), textcoords="offset points", xytext=(6, 0), va="center", color=color)
    axes.margins(x=0.3)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("mean test accuracy")
    axes.set_title("All training rows")
    axes.grid(alpha=0.3)


def _plot_fractions(axes: Axes, cells: Cells) -> None:
    for arm, color in COLORS.items():
        fractions = sorted(fraction for fraction, arms in cells.items() if arm in arms)
        if fractions:
            rows = [cells[fraction][arm] for fraction in fractions]
            means, halves = np.array([interval([row["accuracy"] for row in members]) for members in rows]).T
            axes.errorbar(fractions, means, np.nan_to_num(halves), marker="o", capsize=3, color=color, label=arm)
    fractions = sorted(cells)
    axes.set_xscale("log", base=2)
    axes.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
    axes.set_xlabel("share of the training rows")
    axes.set_ylabel("mean test accuracy")
    axes.set_title("Fewer training rows, as many steps")
    axes.grid(alpha=0.3)
    axes.legend()
