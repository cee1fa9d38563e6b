"""What the rows of the growth study say: exponents, a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.common.plots import save_plot

Row = dict[str, Any]

QUANTITIES = ("parameters", "folder_bytes", "step_bytes", "step_seconds", "adapter_seconds")
COLORS = {"hyperadapt": "#0072B2", "N LoRAs": "#D55E00"}


def curve(rows: Sequence[Row], axis: str, method: str, quantity: str) -> tuple[list[int], list[float]]:
    """A quantity along an axis.

    Args:
        rows: The rows.
        axis: What is varied.
        method: The method.
        quantity: One of ``QUANTITIES``; of times the median.

    Returns:
        Sizes and values.
    """
    chosen = [row for row in rows if row["axis"] == axis and row["method"] == method]
    values = [row[quantity][1] if quantity.endswith("seconds") else row[quantity] for row in chosen]
    return [row[axis] for row in chosen], values


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through log value over log size, by least squares.

    Args:
        sizes: At least two different ones.
        values: Above zero.

    Returns:
        The exponent p of value = c · size^p.
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the table and write the plot.

    Args:
        rows: The rows.
        folder: Where ``growth.svg`` goes.
    """
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    for axis in axes:
        _print_axis(rows, axis)
    _plot(rows, axes, folder)


def _print_axis(rows: Sequence[Row], axis: str) -> None:
    sizes, _ = curve(rows, axis, "hyperadapt", "parameters")
    first = next(row for row in rows if row["axis"] == axis)
    others = ", ".join(f"{name} {first[name]}" for name in ("tasks", "rank", "layers") if name != axis)
    print(f"\n{axis}, at {others}; times as p50 (p20 to p80) in ms, the rest in millions")
    print(f"{'':<16}{'':<12}" + "".join(f"{size:>23}" for size in sizes) + f"{'exponent':>10}")
    for quantity in QUANTITIES:
        for method in COLORS:
            chosen = [row[quantity] for row in rows if row["axis"] == axis and row["method"] == method]
            slope = exponent(*curve(rows, axis, method, quantity))
            print(
                f"{quantity:<16}{method:<12}" + "".join(f"{_cell(value):>23}" for value in chosen) + f"{slope:>z10.2f}"
            )


def _cell(value: float | Sequence[float]) -> str:
    if isinstance(value, Sequence):
        low, middle, high = (_short(1000 * part) for part in value)
        return f"{middle} ({low} to {high})"
    return _short(value / 1e6)


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"


def _plot(rows: Sequence[Row], axes: Sequence[str], folder: Path) -> None:
    figure = Figure(figsize=(3 * len(QUANTITIES), 2.7 * len(axes)), layout="constrained")
    panels = figure.subplots(len(axes), len(QUANTITIES), squeeze=False)
    for line, axis in zip(panels, axes, strict=True):
        for panel, quantity in zip(line, QUANTITIES, strict=True):
            for method, color in COLORS.items():
                sizes, values = curve(rows, axis, method, quantity)
                label = f"{method}: {exponent(sizes, values):z.2f}"
                panel.loglog(sizes, values, marker="o", color=color, label=label)
                if quantity.endswith("seconds"):
                    chosen = [row[quantity] for row in rows if row["axis"] == axis and row["method"] == method]
                    lows, _, highs = zip(*chosen, strict=True)
                    panel.fill_between(sizes, lows, highs, color=color, alpha=0.2, linewidth=0)
            panel.set_xlabel(axis)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_title(quantity.replace("_", " "), fontsize="medium")
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small", title="exponent", title_fontsize="small")
    save_plot(figure, folder / "growth.svg")
    print(f"\nrows and plot: {folder / 'growth.jsonl'}, {folder / 'growth.svg'}")
