"""Intervals over seeds are Student's."""

import math

import pytest

from benchmarks.common.seeds import interval, shown


def test_interval_is_students() -> None:
    # 95% quantile of t with 4 degrees of freedom, from any table: 2.776.
    mean, half = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.776 * 0.025**0.5 / 5**0.5, rel=1e-3)
    assert shown(mean, half, sign="+") == "+0.300 ± 0.196"


def test_what_cannot_be_computed_is_not_shown() -> None:
    assert all(map(math.isnan, interval([])))
    assert shown(*interval([])) == "-"
    assert shown(*interval([0.25])) == "0.250"
