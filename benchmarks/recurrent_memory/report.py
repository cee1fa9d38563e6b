"""Table and plot of the study of recurrent networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.plots import save_plot

CHANCE = 1 / 6
"""Mean squared error of always answering 1, the mean of the sums."""
SOLVED = 0.02
"""Mean squared error below which the task counts as solved."""

Row = dict[str, Any]


def print_table(rows: Sequence[Row]) -> None:
    """Print a line for each length, arm and rate.

    Args:
        rows: The runs.
    """
    print(f"loss: median, best and worst seed after training (chance is {CHANCE:.3f})")
    print("steps: median of those that solved the task; gradient: largest norm of all steps, before clipping")
    titles = ("rate", "loss", "best", "worst", "solved", "steps", "not finite", "gradient")
    print(f"{'length':<8}{'arm':<22}" + "".join(f"{title:>11}" for title in titles))
    for (length, arm, rate), group in itertools.groupby(rows, lambda row: (row["length"], row["arm"], row["rate"])):
        runs = list(group)
        losses, solved = _final_losses(runs), [row["steps_to_solve"] for row in runs if row["steps_to_solve"]]
        cells = (
            f"{rate:g}",
            *(f"{function(losses):.4f}" for function in (median, min, max)),
            f"{len(solved)} of {len(runs)}",
            f"{median(solved):.0f}" if solved else "-",
            f"{sum(not row['finite'] for row in runs)} of {len(runs)}",
            f"{max(row['largest_gradient'] or math.inf for row in runs):.3g}",
        )
        print(f"{length:<8}{arm:<22}" + "".join(f"{cell:>11}" for cell in cells))


def _final_losses(rows: Sequence[Row]) -> list[float]:
    return [math.inf if row["final_loss"] is None else row["final_loss"] for row in rows]


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw final losses over rates, a panel for each length, with all seeds.

    Args:
        rows: The runs.
        folder: Where to save.
    """
    lengths, rates = (sorted({row[name] for row in rows}) for name in ("length", "rate"))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(6 * len(lengths), 5), layout="constrained")
    for length, axes in zip(lengths, figure.subplots(1, len(lengths), sharey=True, squeeze=False).flat, strict=True):
        for place, arm in enumerate(arms):
            runs = [
                _final_losses([row for row in rows if (row["length"], row["arm"], row["rate"]) == (length, arm, rate)])
                for rate in rates
            ]
            shifted = [rate * 1.05 ** (place - len(arms) // 2) for rate in rates]
            [line] = axes.plot(shifted, [median(losses) for losses in runs], label=arm)
            for x, losses in zip(shifted, runs, strict=True):
                axes.plot([x] * len(losses), losses, "o", color=line.get_color(), alpha=0.5, markersize=4)
        axes.axhline(CHANCE, color="gray", linestyle="--", label="chance")
        axes.axhline(SOLVED, color="gray", linestyle=":", label="solved")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", title=f"{length} steps; line: median of the seeds")
    figure.axes[0].set_ylabel("final loss")
    figure.axes[-1].legend(fontsize="small")
    save_plot(figure, folder / "recurrent_memory.svg")
    print(f"rows and plot: {folder / 'recurrent_memory.jsonl'}, {folder / 'recurrent_memory.svg'}")
