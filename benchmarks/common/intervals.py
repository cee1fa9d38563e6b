"""Means over tasks and seeds with their intervals, and differences that are paired by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.common.rows import Row

DRAWS = 2000


class Cell(NamedTuple):
    """What an arm has under a condition: the values ``(seeds, tasks)`` of some tasks, by name."""

    tasks: list[str]
    seeds: list[int]
    values: np.ndarray


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def cell_of(rows: Sequence[Row], condition: str, family: str, measure: int) -> Cell | None:
    """The values of the rows, one for each seed, of the tasks that all of them have; None if there are none."""
    found = {row["seed"]: row["scores"].get(condition, {}).get(family, {}) for row in rows}
    if not found or not all(found.values()):
        return None
    seeds = sorted(found)
    tasks = sorted(set.intersection(*(set(scores) for scores in found.values())))
    values = np.array([[found[seed][task][measure] for task in tasks] for seed in seeds])
    return Cell(tasks, seeds, values)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of ``(seeds, tasks)`` values, and what 95% of the means are of seeds and tasks that are drawn anew."""
    generator = np.random.default_rng(0)
    # How often each seed and each task is drawn, as a share.
    seeds, tasks = (generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in values.shape)
    means = (seeds @ values * tasks).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def difference(one: Cell, other: Cell) -> Estimate:
    """Of two arms or conditions, paired by seed and task; as far as both have them."""
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    tasks = [task for task in one.tasks if task in other.tasks]
    parts = [
        cell.values[np.ix_([cell.seeds.index(s) for s in seeds], [cell.tasks.index(t) for t in tasks])]
        for cell in (one, other)
    ]
    return estimate(parts[0] - parts[1])
