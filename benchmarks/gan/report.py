"""Table and plot of the GAN study."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common.plots import save_plot
from benchmarks.gan.judge import Images, Judge

Row = dict[str, Any]


def print_table(rows: Sequence[Row], judge: Judge) -> None:
    """Print a line for each arm and rate.

    Args:
        rows: The runs.
        judge: The measures.
    """
    print("distance: median, best and worst seed; covered: mean share of digits; gradient: largest norm of all steps")
    print(f"Fréchet distance of training digits {judge.floor:.2f}, of the mean digit {judge.mean_image:.2f}")
    titles = ("rate", "distance", "best", "worst", "covered", "collapsed", "not finite", "gradient")
    print(f"{'arm':<20}" + "".join(f"{title:>11}" for title in titles))
    for (arm, rate), group in itertools.groupby(rows, lambda row: (row["arm"], row["rate"])):
        runs = list(group)
        distances = _distances(runs)
        cells = (
            f"{rate:g}",
            *(f"{function(distances):.2f}" for function in (median, min, max)),
            f"{np.mean([row['covered'] for row in runs]):.0%}",
            f"{sum(row['collapsed'] for row in runs)} of {len(runs)}",
            f"{sum(not row['finite'] for row in runs)} of {len(runs)}",
            f"{max(row['largest_gradient'] for row in runs):.3g}",
        )
        print(f"{arm:<20}" + "".join(f"{cell:>11}" for cell in cells))


def _distances(rows: Sequence[Row]) -> list[float]:
    return [math.inf if row["frechet_distance"] is None else row["frechet_distance"] for row in rows]


def plot(rows: Sequence[Row], strips: Mapping[tuple[str, float], Images], judge: Judge, folder: Path) -> None:
    """Draw distances over rates with all seeds, and images of the first seed.

    Args:
        rows: The runs.
        strips: Images of each arm and rate.
        judge: The measures.
        folder: Where to save.
    """
    arms, rates = list(dict.fromkeys(arm for arm, _ in strips)), sorted({rate for _, rate in strips})
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2, 3)).flat
    axes = left.subplots()
    for place, arm in enumerate(arms):
        runs = [_distances([row for row in rows if (row["arm"], row["rate"]) == (arm, rate)]) for rate in rates]
        shifted = np.array(rates) * 1.06 ** (place - len(arms) // 2)
        [line] = axes.plot(shifted, [median(values) for values in runs], label=arm)
        for x, values in zip(shifted, runs, strict=True):
            axes.plot([x] * len(values), values, "o", color=line.get_color(), alpha=0.5, markersize=4)
    axes.axhline(judge.mean_image, color="gray", linestyle=":", label="mean digit only")
    axes.axhline(judge.floor, color="gray", linestyle="--", label="training digits")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="Fréchet distance; line: median of the seeds")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 0.06))
    grid = right.subplots(len(arms), len(rates), squeeze=False)
    for (row, arm), (column, rate) in itertools.product(enumerate(arms), enumerate(rates)):
        tile = grid[row, column]
        tile.imshow(np.hstack(list(strips[arm, rate].reshape(-1, 8, 8))), cmap="gray_r", vmin=-1, vmax=1)
        tile.set(xticks=[], yticks=[], title=f"rate {rate:g}" if row == 0 else "")
        tile.set_ylabel(arm if column == 0 else "", rotation=0, ha="right", va="center")
    save_plot(figure, folder / "gan.svg")
    print(f"rows and plot: {folder / 'gan.jsonl'}, {folder / 'gan.svg'}")
