"""Intervals over tasks and seeds, and differences that are paired."""

import numpy as np
import pytest

from benchmarks.common.intervals import Cell, cell_of, difference, estimate
from benchmarks.common.rows import Row


def test_cells_hold_what_all_seeds_have() -> None:
    rows: list[Row] = [
        {"seed": 2, "scores": {"true": {"atomic": {"b": [0.5, 0.6], "a": [0.7, 0.8]}}}},
        {"seed": 1, "scores": {"true": {"atomic": {"a": [0.1, 0.2], "b": [0.3, 0.4], "c": [0.0, 0.0]}}}},
    ]
    cell = cell_of(rows, "true", "atomic", 1)
    assert cell is not None
    assert (cell.tasks, cell.seeds, cell.values.tolist()) == (["a", "b"], [1, 2], [[0.2, 0.4], [0.8, 0.6]])
    assert cell_of(rows, "blank", "atomic", 1) is None
    assert cell_of([], "true", "atomic", 1) is None


def test_an_interval_covers_tasks_and_seeds() -> None:
    generator = np.random.default_rng(1)
    tasks, seeds = generator.normal(0, 0.1, 40), generator.normal(0, 0.1, 40)
    for values in (np.tile(tasks, (40, 1)), np.tile(seeds[:, None], (1, 40))):
        mean, low, high = estimate(values)
        assert mean == pytest.approx(values.mean())
        # Of a mean of 40 independent values: 1.96 standard errors to either side.
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.1)
    constant = estimate(np.full((2, 3), 0.5))
    assert constant == (0.5, 0.5, 0.5)


def test_differences_are_paired_by_seed_and_task() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5))
    one = Cell(list("abcde"), [1, 2, 3], values)
    other = Cell(list("edcba"), [3, 2, 1], (values - 0.25)[::-1, ::-1])
    assert difference(one, other) == pytest.approx((0.25, 0.25, 0.25))
    part = Cell(["c"], [2], values[1:2, 2:3] - 0.5)
    assert difference(one, part).mean == pytest.approx(0.5)
