"""What the stability study's rows say of each arm."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.transfer_report import interval

Row = dict[str, Any]

POINT = 0.01
SIZES = {
    "": "hypernetwork as by default",
    "deep: ": "8 blocks deep",
    "wide: ": "512 wide",
    "64, additive: ": "64 wide, not gated",
}


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one rate.

    Attributes:
        rows: One per seed.
    """

    rows: list[Row]

    @property
    def accuracies(self) -> list[float]:
        """By seed; 0 where something was not finite."""
        return [row["accuracy"] or 0.0 for row in self.rows]

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return fmean(self.accuracies)

    @property
    def has_diverged(self) -> bool:
        """Whether any seed has."""
        return any(row["diverged"] for row in self.rows)

    @property
    def loss(self) -> float:
        """Mean final validation loss, in nats; NaN if one is not finite."""
        return fmean(math.nan if row["loss"] is None else row["loss"] for row in self.rows)

    @property
    def steps_to_loss(self) -> float:
        """Median over seeds; infinite where most do not reach it."""
        return median(row["steps_to_loss"] or math.inf for row in self.rows)


Cells = dict[float, Cell]


def complete_seeds(rows: Sequence[Row]) -> list[Row]:
    """Rows of the seeds that have the most, since others are still running.

    Args:
        rows: Rows.

    Returns:
        Some of them.
    """
    counts = Counter(row["seed"] for row in rows)
    return [row for row in rows if counts[row["seed"]] == max(counts.values())]


def by_arm(rows: Sequence[Row]) -> dict[str, Cells]:
    """Sort rows.

    Args:
        rows: Rows.

    Returns:
        Arm -> rate, increasing -> its runs.
    """
    cells: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["rate"]):
        cells[row["arm"]][row["rate"]].append(row)
    names = dict.fromkeys(row["arm"] for row in rows)
    return {name: {rate: Cell(members) for rate, members in cells[name].items()} for name in names}


def best_rate(cells: Cells) -> float | None:
    """The rate of the highest mean accuracy, among those with no diverged seed.

    Args:
        cells: Of one arm.

    Returns:
        The smallest such rate; None if a seed diverged at every rate.
    """
    return max(
        (rate for rate, cell in cells.items() if not cell.has_diverged),
        key=lambda rate: cells[rate].accuracy,
        default=None,
    )


def good_range(cells: Cells, least: float) -> list[float]:
    """The longest run of consecutive rates with at least some mean accuracy and no diverged seed.

    Args:
        cells: Of one arm.
        least: The accuracy.

    Returns:
        The rates, the lowest such run if several are as long; empty if there is none.
    """
    runs: list[list[float]] = [[]]
    for rate, cell in cells.items():
        # Accuracies are multiples of one row's share, so a margin is often met exactly.
        if cell.accuracy >= least - 1e-9 and not cell.has_diverged:
            runs[-1].append(rate)
        else:
            runs.append([])
    return max(runs, key=len)


def summarize_arms(rows: Sequence[Row]) -> list[Row]:
    """What the table says of each arm.

    Args:
        rows: Rows with as many seeds everywhere.

    Returns:
        One dict per arm. A range's width is its highest rate by its lowest, 0 without any rate. Relative widths are
        by those of plain LoRA, and of ``none`` with a hypernetwork of the same size; NaN where that has none.
        ``minus_lora`` is the mean difference of accuracies by seed, and half its 95% interval, of both at their best
        rates.
    """
    arms = by_arm(rows)
    best = {name: best_rate(cells) for name, cells in arms.items()}
    tops = {name: 0.0 if rate is None else arms[name][rate].accuracy for name, rate in best.items()}
    own = {name: good_range(cells, tops[name] - POINT) for name, cells in arms.items()}
    summaries = []
    for name, cells in arms.items():
        members = [row for cell in cells.values() for row in cell.rows]
        rate, none = best[name], f"{size_of(name)}none"
        summaries.append(
            {
                "arm": name,
                "best_rate": rate,
                "accuracy": tops[name],
                "minus_lora": interval(differences(cells.get(rate), arms.get("lora", {}).get(best.get("lora")))),
                "loss": math.nan if rate is None else cells[rate].loss,
                "range": own[name],
                "width": width(own[name]),
                "by_lora": width(own[name]) / (width(own.get("lora", [])) or math.nan),
                "by_none": width(own[name]) / (width(own.get(none, [])) or math.nan),
                "width_2_points": width(good_range(cells, tops[name] - 2 * POINT)),
                "width_of_best_arm": width(good_range(cells, max(tops.values()) - POINT)),
                "width_2_points_of_best_arm": width(good_range(cells, max(tops.values()) - 2 * POINT)),
                "diverged": fmean(row["diverged"] for row in members),
                "not_finite": sum(row["failure"] is not None for row in members),
                "spikes": fmean(row["spikes"] for row in members),
                "gradient_at_best": math.nan if rate is None else largest_gradient(cells[rate].rows),
                "gradient": largest_gradient(members),
                "steps_to_loss": min(cell.steps_to_loss for cell in cells.values()),
            }
        )
    return summaries


def differences(cell: Cell | None, other: Cell | None) -> list[float]:
    """Accuracy of one arm's runs minus that of another's.

    Args:
        cell: The runs of an arm; None stands for none.
        other: The same of the other arm.

    Returns:
        One difference for each seed that both have.
    """
    if cell is None or other is None:
        return []
    accuracies = dict(zip((row["seed"] for row in other.rows), other.accuracies, strict=True))
    pairs = zip((row["seed"] for row in cell.rows), cell.accuracies, strict=True)
    return [accuracy - accuracies[seed] for seed, accuracy in pairs if seed in accuracies]


def size_of(name: str) -> str:
    """The prefix of an arm's name that tells the hypernetwork's size.

    Args:
        name: The arm.

    Returns:
        One of ``SIZES``.
    """
    return next(size for size in reversed(SIZES) if name.startswith(size))


def width(rates: Sequence[float]) -> float:
    """Highest rate by lowest, to two digits: the rates themselves are rounded.

    Args:
        rates: In increasing order.

    Returns:
        At least 1, or 0 if there are none.
    """
    return float(f"{rates[-1] / rates[0]:.2g}") if rates else 0.0


def largest_gradient(rows: Sequence[Row]) -> float:
    """Largest norm of a gradient in any step.

    Args:
        rows: Rows.

    Returns:
        The norm; NaN if none was finite.
    """
    return max((row["largest_gradient"] for row in rows if row["largest_gradient"] is not None), default=math.nan)
