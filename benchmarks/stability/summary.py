"""What the stability study's rows say of each arm, and which candidates they choose."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.common.seeds import interval
from benchmarks.stability.arms import ARMS

Row = dict[str, Any]

POINT = 0.01
WIDER = 2 * POINT
OURS = "is_ours"


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one rate, one row per seed."""

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
    def diverged(self) -> int:
        """How many seeds have."""
        return sum(row["diverged"] for row in self.rows)


Cells = dict[float, Cell]


def label(arm: str, candidate: str) -> str:
    """An arm's name with its candidate, if it has several."""
    return f"{arm} ({candidate})" if candidate else arm


def by_arm(rows: Sequence[Row]) -> dict[str, Cells]:
    """Label -> rate, increasing -> its runs, by seed; in the order of the arms, not of the rows."""
    cells: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["rate"], row["seed"])):
        cells[label(row["arm"], row["candidate"])][row["rate"]].append(row)
    return {
        name: {rate: Cell(members) for rate, members in cells[name].items()}
        for arm, candidates in ARMS.items()
        for name in (label(arm, candidate) for candidate in candidates)
        if name in cells
    }


def best_rate(cells: Cells) -> float | None:
    """The rate of the highest mean accuracy among those with no diverged seed; None if there is none."""
    return max(
        (rate for rate, cell in cells.items() if not cell.diverged),
        key=lambda rate: cells[rate].accuracy,
        default=None,
    )


def top(cells: Cells) -> float:
    """Mean accuracy at the best rate; 0 if a seed diverged at every rate."""
    rate = best_rate(cells)
    return 0.0 if rate is None else cells[rate].accuracy


def good_range(cells: Cells, least: float) -> list[float]:
    """The longest run of consecutive rates with at least some mean accuracy and no diverged seed; the lowest such."""
    runs: list[list[float]] = [[]]
    for rate, cell in cells.items():
        # Accuracies are multiples of one row's share, so a margin is often met exactly.
        if cell.accuracy >= least - 1e-9 and not cell.diverged:
            runs[-1].append(rate)
        else:
            runs.append([])
    return max(runs, key=len)


def decades(rates: Sequence[float]) -> float:
    """Decades from the lowest rate to the highest, in halves, as rates are; NaN if there are none."""
    return round(2 * math.log10(rates[-1] / rates[0])) / 2 if rates else math.nan


def differences(cell: Cell | None, other: Cell | None) -> list[float]:
    """Accuracy of one arm's runs minus that of another's, for each seed that both have."""
    if cell is None or other is None:
        return []
    accuracies = {row["seed"]: accuracy for row, accuracy in zip(other.rows, other.accuracies, strict=True)}
    pairs = zip(cell.rows, cell.accuracies, strict=True)
    return [accuracy - accuracies[row["seed"]] for row, accuracy in pairs if row["seed"] in accuracies]


def summarize_arms(arms: Mapping[str, Cells]) -> list[Row]:
    """What the table says of each arm.

    Differences are of accuracies, by seed, with half their 95% interval: `minus_lora` of both at their best rates,
    `at_loras_rate` of both at LoRA's best, and `least` at the same rate, where the interval reaches lowest.
    """
    lora = arms.get("lora", {})
    loras_rate, best_of_all = best_rate(lora), max(map(top, arms.values()))
    summaries = []
    for name, cells in arms.items():
        rate, good = best_rate(cells), good_range(cells, best_of_all - POINT)
        same = {rate: interval(differences(cell, lora.get(rate))) for rate, cell in cells.items()}
        least = min(same, key=lambda rate: same[rate][0] - same[rate][1] if same[rate][1] >= 0 else same[rate][0])
        members = [row for cell in cells.values() for row in cell.rows]
        summaries.append(
            {
                "arm": name,
                "best_rate": rate,
                "accuracy": top(cells),
                "minus_lora": interval(differences(cells.get(rate), lora.get(loras_rate))),
                "at_loras_rate": interval(differences(cells.get(loras_rate), lora.get(loras_rate))),
                "least": same[least],
                "least_rate": least,
                "range": good,
                "decades": decades(good),
                "wider_decades": decades(good_range(cells, best_of_all - WIDER)),
                "diverged": sum(cell.diverged for cell in cells.values()),
                "runs": len(members),
                "cpu_seconds": median(row["cpu_seconds"] for row in members),
            }
        )
    return summaries


def choose(rows: Sequence[Row]) -> list[Row]:
    """The best candidate of each arm, and which arm with a normalisation is called ours.

    Best is what stays within a point of the best of all arms over the most decades, then within two points, and then
    what is most accurate at its best rate.
    """
    cells = by_arm(rows)
    summaries = {row["arm"]: row for row in summarize_arms(cells)}

    def merit(choice: Row) -> tuple[float, ...]:
        widths = (choice["decades"], choice["wider_decades"])
        return *(-1.0 if width is None else width for width in widths), choice["accuracy"]

    def candidate_row(arm: str, candidate: str) -> Row:
        summary = summaries[label(arm, candidate)]
        widths = {name: summary[name] for name in ("decades", "wider_decades")}
        return {
            "arm": arm,
            "candidate": candidate,
            "best_rate": summary["best_rate"],
            "accuracy": round(summary["accuracy"], 5),
            **{name: None if math.isnan(width) else width for name, width in widths.items()},
        }

    choices = []
    for arm, candidates in ARMS.items():
        if made := [candidate_row(arm, candidate) for candidate in candidates if label(arm, candidate) in cells]:
            choices.append(max(made, key=merit))
    ours = max((choice for choice in choices if _is_normalized(choice)), key=merit, default=None)
    return [choice | {OURS: choice is ours} for choice in choices]


def _is_normalized(choice: Row) -> bool:
    arm = ARMS[choice["arm"]][choice["candidate"]]
    return arm.fields.get("normalization", "none") != "none"
