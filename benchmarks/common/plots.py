"""Plots of benchmarks as files: one scalable picture each, the same bytes from the same rows."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write an SVG file whose text stays text, which takes a fraction of its outlines."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
