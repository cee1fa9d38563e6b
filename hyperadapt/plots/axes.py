"""What the pictures share: settings, names, and axes on which zeros and broken values are not lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDTH = 8
"""Of all pictures, in inches: text of 10 points is read easily where a picture is shown 800 pixels wide."""
# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, RED, ORANGE = "#0072B2", "#D55E00", "#E69F00"
LIGHT_GREY, GREY = "#BBBBBB", "#777777"
_MAX_TICKS = 30
# Side by side below a picture.
_MAX_CHARACTERS = 75
FINE_TICKS = (1, 2, 3, 5)
"""Within a decade."""
_STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "hyperadapt",
}


def picture_style() -> AbstractContextManager[None]:
    """Settings for making and saving pictures, whatever the user's own are; those come back afterwards."""
    return style.context(_STYLE, after_reset=True)


def label(name: str, width: int = 28) -> str:
    """A name as it stands in a picture: on one line, not read as a formula, without its middle if it is long."""
    text = " ".join(name.split())
    if len(text) > width:
        text = f"{text[: width // 2]}…{text[width // 2 + 1 - width :]}"
    # A legend leaves out what begins with an underscore.
    return text.replace("$", r"\$") if not text.startswith("_") else f" {text}"


def counted(number: int, noun: str) -> str:
    """A number of things in words, such as "3 tasks"; the noun is given in the singular."""
    return f"{number} {noun}{'s' * (number != 1)}"


def name_ticks(axis: Axis, names: Sequence[str], places: Sequence[float] | None = None) -> None:
    """Name the ticks of an axis: of many only every n-th, and along x slanted where they need the room."""
    step = math.ceil(len(names) / _MAX_TICKS)
    labels = [label(name) for name in names[::step]]
    look: dict[str, Any] = {"fontsize": 9 if len(names) <= 20 else 7.5}
    if isinstance(axis, XAxis) and len(labels) * max(map(len, labels)) > _MAX_CHARACTERS:
        look |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(list(range(len(names)) if places is None else places)[::step], labels, **look)
    axis.set_tick_params(length=0 if step == 1 else 3)


def draw_spread(axes: Axes, x: Array, values: Array, name: str, color: str, line: str) -> None:
    """Draw median and range of `values`, shape ``(any, n)``, at x, shape ``(n,)``; NaN is left out."""
    shown = ~np.isnan(values).all(0)
    median, low, high = np.full((3, len(x)), np.nan)
    median[shown] = np.nanmedian(values[:, shown], axis=0)
    low[shown], high[shown] = np.nanmin(values[:, shown], axis=0), np.nanmax(values[:, shown], axis=0)
    axes.fill_between(x, low, high, facecolor=color, edgecolor="none", alpha=0.15)
    for bound in (low, high):
        axes.plot(x, bound, color=color, linewidth=0.6, marker="_" if len(x) == 1 else None)
    axes.plot(x, median, line, color=color, label=name, markersize=5)


def use_log_scale(axes: Axes) -> None:
    """Scale y by the lines drawn so far; zeros, which have no place there, are marked at the lower edge."""
    x, y = np.concatenate([np.asarray(line.get_xydata(), dtype=np.float64) for line in axes.lines]).T
    positive = y[y > 0]
    low, high = (positive.min() / 1.5, positive.max() * 1.5) if positive.size else (0.1, 1)
    # First the limits: without them, zeros alone would be a warning.
    axes.set_ylim(low, high)
    axes.set_yscale("log", nonpositive="clip")
    if high < 300 * low:
        # A decade or two have too few powers of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=FINE_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    mark(axes, x[y == 0], 0, "v", "zero")


def mark(axes: Axes, x: Array, edge: float, marker: str, name: str) -> None:
    """Mark at places x along the lower (0) or upper (1) edge what cannot be drawn."""
    x = np.unique(x)
    if x.size:
        look: dict[str, Any] = {"linestyle": "none", "color": RED, "clip_on": False, "zorder": 5}
        axes.plot(x, np.full_like(x, edge), transform=axes.get_xaxis_transform(), marker=marker, label=name, **look)
