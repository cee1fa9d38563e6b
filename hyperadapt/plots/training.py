"""Picture of the course of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hyperadapt.config.checks import shown
from hyperadapt.plots.axes import (
    BLUE,
    COLORS,
    GREY,
    LIGHT_GREY,
    ORANGE,
    WIDTH,
    Array,
    counted,
    draw_spread,
    label,
    mark,
    picture_style,
    use_log_scale,
)

_MAX_NAMED = 2 * len(COLORS)
_NAMED_OF_MORE = 5
_MAX_DOTS = 40
# What recipes choose a checkpoint by, and Trainer.
_METRICS = ("eval_mean_accuracy", "eval_mean_loss", "eval_loss")


def training_figure(
    log_history: Sequence[Mapping[str, Any]], tasks: Sequence[str], chosen_by: str | None = None
) -> Figure | None:
    """The training loss, what chose the checkpoint, and the norm of the gradient on a logarithmic axis.

    None if no training loss was logged. Reads ``loss``, ``loss_<task>``, ``grad_norm``, ``grad_norm/<position>`` and
    the metric `chosen_by`, where they were logged. Values that are not finite are marked at the upper edge, norms of
    zero at the lower one. Of more than 14 tasks only the five with the highest losses at the end have names.
    """
    if isinstance(log_history, Mapping) or not all(isinstance(entry, Mapping) for entry in log_history):
        raise TypeError(f"log_history={shown(log_history)} must be a list of dicts; pass trainer.state.log_history.")
    entries = [entry for entry in log_history if "loss" in entry and "step" in entry]
    if not entries:
        return None
    has_norms = any(key.partition("/")[0] == "grad_norm" for entry in entries for key in entry)
    metric = _choosing_metric(log_history, chosen_by)
    with picture_style():
        count = 1 + (metric is not None) + has_norms
        figure = Figure(figsize=(WIDTH, 1.1 + 2.7 * count), layout="constrained")
        panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        _draw_losses(panels[0], entries, tasks)
        if metric is not None:
            _draw_choice(panels[1], log_history, metric)
        if has_norms:
            _draw_gradient_norms(panels[-1], entries)
        panels[-1].set_xlabel("step of the optimiser")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axes in panels:
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return figure


def _draw_losses(axes: Axes, entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    curves = {task: _series(entries, f"loss_{task}") for task in tasks}
    curves = {task: curve for task, curve in curves.items() if curve.size}
    named = list(curves)
    if len(named) > _MAX_NAMED:
        named = sorted(curves, key=lambda task: -_last(curves[task]))[:_NAMED_OF_MORE]
        for task in (task for task in curves if task not in named):
            _draw_line(axes, curves[task], color=LIGHT_GREY, linewidth=0.6)
    for index, task in enumerate(named):
        look = {"color": COLORS[index % len(COLORS)], "linestyle": ("-", "--")[index // len(COLORS)]}
        _draw_line(axes, curves[task], label=label(task), linewidth=1.2, **look)
    everything = _series(entries, "loss")
    # Behind a few lines, but on top of many.
    layer = 1 if len(named) == len(curves) else 3
    _draw_line(axes, everything, label="all rows", color=GREY, linewidth=3, zorder=layer)
    _mark_broken(axes, [everything, *curves.values()])
    axes.set_ylabel("training loss")
    highest = f"; the {_NAMED_OF_MORE} highest at the end of {len(curves)} have names"
    axes.set_title(f"Training loss{' by task' if curves else ''}{highest if len(named) < len(curves) else ''}")


def _choosing_metric(log_history: Sequence[Mapping[str, Any]], chosen_by: str | None) -> str | None:
    """The metric of an evaluation that chose the checkpoint, or would have; None if none was logged."""
    names = _METRICS if chosen_by is None else (f"eval_{chosen_by.removeprefix('eval_')}",)
    return next((name for name in names if any(name in entry and "step" in entry for entry in log_history)), None)


def _draw_choice(axes: Axes, log_history: Sequence[Mapping[str, Any]], metric: str) -> None:
    curve = _series([entry for entry in log_history if "step" in entry], metric)
    words = metric.removeprefix("eval_").replace("_", " ")
    _draw_line(axes, curve, label=words, color=BLUE)
    steps, values = curve[:, np.isfinite(curve[1])]
    if steps.size:
        # As Trainer decides it; of equal ones it keeps the first.
        best = int(values.argmin() if metric.endswith("loss") else values.argmax())
        axes.plot(steps[best], values[best], "o", color=ORANGE, markersize=8, label=f"best, step {steps[best]:g}")
    _mark_broken(axes, [curve])
    axes.set_ylabel(words)
    axes.set_title("On the validation rows: what chooses the checkpoint")


def _draw_gradient_norms(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    everything = _series(entries, "grad_norm")
    curves = [
        _series(entries, key)
        for key in dict.fromkeys(key for entry in entries for key in entry)
        if key.startswith("grad_norm/")
    ]
    if curves:
        steps = np.unique(np.concatenate(curves, axis=1)[0])
        values = np.full((len(curves), len(steps)), np.nan)
        for row, (at, found) in zip(values, curves, strict=True):
            row[np.searchsorted(steps, at)] = np.where(np.isfinite(found), found, np.nan)
        name = f"factors A, B at each of\n{counted(len(curves), 'position')}: median, range"
        draw_spread(axes, steps, values, name, ORANGE, ".--" if len(steps) <= _MAX_DOTS else "--")
    if everything.size:
        _draw_line(axes, everything, label="all parameters", color=BLUE)
    use_log_scale(axes)
    _mark_broken(axes, [everything, *curves])
    axes.set_ylabel("norm of the gradient")
    axes.set_title(f"Norm of the gradient{', overall and by position' if curves else ''}")


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> Array:
    """Steps and values of the entries that have the key, shape (2, n)."""
    found = [(entry["step"], entry[key]) for entry in entries if key in entry]
    for step, value in found:
        if not (isinstance(step, Real) and isinstance(value, Real)):
            raise TypeError(
                f"log_history has {key}={shown(value)} at step={shown(step)}; both must be numbers. Pass what the "
                "trainer logged: trainer.state.log_history."
            )
    return np.array(found, dtype=np.float64).reshape(-1, 2).T


def _last(curve: Array) -> float:
    """The last value; one that is not finite counts as the highest."""
    return float(curve[1, -1]) if math.isfinite(curve[1, -1]) else math.inf


def _draw_line(axes: Axes, curve: Array, **look: Any) -> None:
    steps, values = curve
    # Without marks a single point would not be seen.
    marker = "." if len(steps) <= _MAX_DOTS else None
    axes.plot(steps, np.where(np.isfinite(values), values, np.nan), marker=marker, **look)


def _mark_broken(axes: Axes, curves: Sequence[Array]) -> None:
    steps, values = np.concatenate(curves, axis=1)
    mark(axes, steps[~np.isfinite(values)], 1, "x", "not finite")
