"""Means of seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t


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
