"""Table and plot of the transfer benchmark's rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks.plots import save_plot
from benchmarks.rows import read_rows
from benchmarks.transfer_arms import TRAINED

# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {
    "majority": "#999999",
    "base": "#000000",
    "lora": "#E69F00",
    "poly": "#CC79A7",
    "hyperadapt true": "#0072B2",
    "hyperadapt shuffled": "#56B4E9",
    "hyperadapt random": "#009E73",
    "hyperadapt blank": "#F0E442",
    "hyperadapt, examples": "#0072B2",
    "lora r=8, examples": "#D55E00",
}
REFERENCES = ("hyperadapt true", "hyperadapt, examples")
"""Arms whose differences to the others, with as many examples, are printed."""

Scores = dict[tuple[str, int], dict[str, dict[int, float]]]


def read_scores(folder: Path) -> tuple[Scores, list[str]]:
    """Read the row files.

    Args:
        folder: Where they are.

    Returns:
        (Arm, number of examples) -> task -> seed -> accuracy, and the held-out tasks.

    Raises:
        FileNotFoundError: If there is none.
    """
    rows = [row for path in sorted(folder.glob("rows_*.jsonl")) for row in read_rows(path)]
    if not rows:
        raise FileNotFoundError(f"{folder} has no rows yet: run the benchmark without --report first.")
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        scores[row["arm"], row["n"]][row["task"]][row["seed"]] = row["accuracy"]
    held_out = [name for name in dict.fromkeys(row["task"] for row in rows) if name != TRAINED]
    order = list(COLORS)
    return dict(sorted(scores.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))), held_out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t interval.

    Args:
        values: One per seed.

    Returns:
        The two numbers; NaN where one or both cannot be computed.
    """
    count = len(values)
    if count < 2:
        return (values[0] if count else math.nan), math.nan
    return float(np.mean(values)), float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


def report(folder: Path) -> None:
    """Print the tables and write ``transfer.svg``.

    Args:
        folder: Where the row files are and the plots go.
    """
    scores, held_out = read_scores(folder)
    columns = [*held_out, "mean held-out", "trained"]
    print(f"\n{'arm':<34}{'n':>4}{'seeds':>6}" + "".join(f"{name:>17}" for name in columns))
    for (arm, count), tasks in scores.items():
        means = _means(tasks, held_out)
        cells = [*(list(tasks[name].values()) for name in held_out), list(means.values())]
        cells.append(list(tasks[TRAINED].values()))
        print(f"{arm:<34}{count:>4}{len(means):>6}" + "".join(f"{shown(*interval(cell)):>17}" for cell in cells))

    for (arm, count), tasks in scores.items():
        if arm in REFERENCES:
            print(f"\n{arm!r}, n={count}, minus another: mean over held-out tasks, by seed")
            _print_differences(_means(tasks, held_out), arm, count, scores, held_out)
    _plot(scores, held_out, folder)


def _print_differences(
    reference: dict[int, float], reference_arm: str, reference_count: int, scores: Scores, held_out: Sequence[str]
) -> None:
    for (arm, count), tasks in scores.items():
        others = _means(tasks, held_out)
        differences = [reference[seed] - others[seed] for seed in reference if seed in others]
        if arm != reference_arm and count == reference_count and differences:
            print(f"{arm:<38}{len(differences):>6}{shown(*interval(differences), sign='+'):>17}")


def _means(tasks: dict[str, dict[int, float]], held_out: Sequence[str]) -> dict[int, float]:
    """Seed -> mean over the held-out tasks, of seeds that have them all."""
    seeds = set.intersection(*(set(tasks[name]) for name in held_out))
    return {seed: float(np.mean([tasks[name][seed] for name in held_out])) for seed in sorted(seeds)}


def shown(mean: float, half: float, sign: str = "") -> str:
    """A mean with its interval, as text.

    Args:
        mean: The mean.
        half: Half the interval's width; NaN where there is none.
        sign: ``"+"`` to show the sign of a positive number.

    Returns:
        The text; a dash without a mean.
    """
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _plot(scores: Scores, held_out: Sequence[str], folder: Path) -> None:
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_zero_shot(left, scores, held_out)
    _plot_few_shot(right, scores, held_out)
    save_plot(figure, folder / "transfer.svg")
    print(f"\nplot: {folder / 'transfer.svg'}")


def _plot_zero_shot(axes: Axes, scores: Scores, held_out: Sequence[str]) -> None:
    arms = [arm for arm, count in scores if count == 0]
    places = np.arange(len(held_out) + 1.0)
    for index, arm in enumerate(arms):
        tasks = scores[arm, 0]
        cells = [*(list(tasks[name].values()) for name in held_out), list(_means(tasks, held_out).values())]
        means, halves = np.array([interval(cell) for cell in cells]).T
        shift = (index - (len(arms) - 1) / 2) * 0.8 / len(arms)
        # A single seed has no interval.
        axes.errorbar(
            places + shift, means, np.nan_to_num(halves), fmt="o", capsize=3, color=COLORS[arm], label=arm, zorder=3
        )
    axes.set_xticks(places, [*held_out, "mean"])
    axes.set_ylabel("test accuracy")
    axes.set_title("No example of the task")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _plot_few_shot(axes: Axes, scores: Scores, held_out: Sequence[str]) -> None:
    counts = sorted({count for _, count in scores if count})
    for arm in dict.fromkeys(arm for arm, count in scores if count):
        shown = [count for count in counts if (arm, count) in scores]
        cells = [list(_means(scores[arm, count], held_out).values()) for count in shown]
        means, halves = np.array([interval(cell) for cell in cells]).T
        axes.errorbar(shown, means, np.nan_to_num(halves), marker="o", capsize=3, color=COLORS[arm], label=arm)
    for arm, style in (("base", ":"), ("lora", "-."), (REFERENCES[0], "--")):
        if (arm, 0) in scores:
            mean, _ = interval(list(_means(scores[arm, 0], held_out).values()))
            axes.axhline(mean, color=COLORS[arm], linestyle=style, label=f"{arm}, no examples")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("labelled examples of the task")
    axes.set_ylabel("test accuracy, mean over held-out tasks")
    axes.set_title("A few examples of the task")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small")
