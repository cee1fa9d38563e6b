"""Tables and plot of the stability study's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.plots import save_plot
from benchmarks.rows import write_rows
from benchmarks.stability_summary import SIZES, Cells, Row, by_arm, complete_seeds, size_of, summarize_arms
from benchmarks.transfer_report import shown

# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {
    "lora": "#E69F00",
    "none": "#000000",
    "none + clipping": "#999999",
    "soft_frobenius": "#0072B2",
    "frobenius": "#009E73",
    "polar": "#CC79A7",
}
# Two lines of the heading, and the width, of each column but the arm's.
COLUMNS = (
    ("best", "rate", 9),
    ("accu-", "racy", 9),
    ("", "loss", 9),
    ("minus lora", "by seed", 17),
    ("within 1 point", "of its best", 22),
    ("", "ratio", 9),
    ("by", "lora", 9),
    ("by", "none", 9),
    ("within", "2", 9),
    ("within", "1, all", 9),
    ("within", "2, all", 9),
    ("di-", "verged", 9),
    ("not", "finite", 9),
    ("", "spikes", 9),
    ("gradi-", "ent", 9),
    ("largest", "at all", 9),
    ("steps", "to loss", 9),
)
WIDTHS = ("width", "by_lora", "by_none", "width_2_points", "width_of_best_arm", "width_2_points_of_best_arm")


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the tables and write ``stability.jsonl`` and ``stability.svg``.

    Args:
        rows: The rows.
        folder: Where the files go; it is made.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows=[]: there is nothing to report yet. Run the benchmark without --report first.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = complete_seeds(rows)
    arms, summaries = by_arm(rows), summarize_arms(rows)
    _print_summaries(summaries, sorted({row["seed"] for row in rows}))
    _print_accuracies(arms)
    write_rows(folder / "stability.jsonl", rows)
    _plot(arms, {summary["arm"]: summary["range"] for summary in summaries}, folder)


def _print_summaries(summaries: Sequence[Row], seeds: Sequence[int]) -> None:
    names = ", ".join(map(str, seeds))
    print(f"\nseeds {names}; accuracy, loss and gradient at the best rate; ranges of rates as highest / lowest")
    rows = (
        [
            row["arm"],
            "-" if row["best_rate"] is None else f"{row['best_rate']:g}",
            f"{row['accuracy']:.3f}",
            f"{row['loss']:.3f}",
            shown(*row["minus_lora"], sign="+"),
            f"{row['range'][0]:g} to {row['range'][-1]:g}" if row["range"] else "-",
            *(f"{row[name]:.3g}" for name in WIDTHS),
            f"{row['diverged']:.0%}",
            str(row["not_finite"]),
            f"{row['spikes']:.2f}",
            *(f"{row[name]:.3g}" for name in ("gradient_at_best", "gradient", "steps_to_loss")),
        ]
        for row in summaries
    )
    above, below, widths = zip(*COLUMNS, strict=True)
    for name, *cells in (("", *above), ("arm", *below), *rows):
        print(f"{name:<42}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def _print_accuracies(arms: dict[str, Cells]) -> None:
    rates = _all_rates(arms)
    print("\nmean accuracy in percent by rate; ! marks a diverged seed")
    print(f"{'arm':<42}" + "".join(f"{rate:>10g}" for rate in rates))
    for name, cells in arms.items():
        accuracies = (
            f"{100 * cells[rate].accuracy:>9.1f}{'!' if cells[rate].has_diverged else ' '}"
            if rate in cells
            else " " * 10
            for rate in rates
        )
        print((f"{name:<42}" + "".join(accuracies)).rstrip())


def _all_rates(arms: dict[str, Cells]) -> list[float]:
    return sorted({rate for cells in arms.values() for rate in cells})


def _plot(arms: dict[str, Cells], ranges: dict[str, list[float]], folder: Path) -> None:
    figure = Figure(figsize=(19, 0.3 * len(arms) + 3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    _plot_table(left.subplots(), arms, ranges)
    sizes = [size for size in SIZES if any(size_of(name) == size for name in arms)]
    for size, axes in zip(
        sizes, right.subplots(len(sizes), 1, sharex=True, sharey=True, squeeze=False).flat, strict=True
    ):
        _plot_curves(axes, arms, size)
    save_plot(figure, folder / "stability.svg")
    print(f"\nrows and plot: {folder / 'stability.jsonl'}, {folder / 'stability.svg'}")


def _plot_table(axes: Axes, arms: dict[str, Cells], ranges: dict[str, list[float]]) -> None:
    """Colour tells accuracy, a cross a diverged seed, a frame the rates within a point of the arm's best."""
    rates = _all_rates(arms)
    values = np.array(
        [[cells[rate].accuracy if rate in cells else np.nan for rate in rates] for cells in arms.values()]
    )
    low, high = np.nanmin(values[values > 0], initial=1.0), np.nanmax(values)
    axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for index, (name, cells) in enumerate(arms.items()):
        for column, rate in enumerate(rates):
            if rate in cells:
                text = f"{100 * values[index, column]:.0f}" + (" ×" if cells[rate].has_diverged else "")
                color = "white" if values[index, column] < (low + high) / 2 else "black"
                axes.text(column, index, text, ha="center", va="center", color=color, fontsize="small")
        if frame := ranges[name]:
            corner = (rates.index(frame[0]) - 0.47, index - 0.44)
            axes.add_patch(Rectangle(corner, len(frame) - 0.06, 0.88, fill=False, edgecolor="#D55E00", linewidth=2.5))
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_xlabel("learning rate")
    axes.set_title("Mean accuracy (%); × a diverged seed; framed: within one point of the arm's best, no diverged seed")


def _plot_curves(axes: Axes, arms: dict[str, Cells], size: str) -> None:
    for arm, color in COLORS.items():
        name = arm if arm == "lora" else size + arm
        if name in arms:
            cells = arms[name]
            lows, highs = zip(*((min(cell.accuracies), max(cell.accuracies)) for cell in cells.values()), strict=True)
            means = [cell.accuracy for cell in cells.values()]
            axes.plot(list(cells), means, "--" if arm == "lora" else "-", marker="o", color=color, label=arm)
            axes.fill_between(list(cells), lows, highs, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.set_title(f"{SIZES[size]}: mean, lowest and highest seed")
    axes.set_ylabel("accuracy")
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
