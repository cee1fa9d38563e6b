"""Pictures of an adapter's tasks and of the updates that it generates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor, nn

from hyperadapt.diagnosis import Diagnosis
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.hypernetwork.updates import spectrum
from hyperadapt.plots.axes import (
    BLUE,
    FINE_TICKS,
    ORANGE,
    WIDTH,
    Array,
    counted,
    draw_spread,
    label,
    name_ticks,
    picture_style,
    use_log_scale,
)

# What rounding in float64 leaves of zeros, relative to the largest singular value or to a variance of 1.
_ROUNDING = 1e-14
_MAX_VALUES = 12
_MAX_NAMES = 40
_NO_VALUE = "#DDDDDD"


def adapter_figures(network: HyperAdapterNetwork, diagnosis: Diagnosis) -> dict[str, Figure]:
    """What a network generates for the measured tasks: figures by name, as ``plots.draw`` lists them."""
    ids = torch.tensor([network.config.task_names.index(task) for task in diagnosis.tasks])
    figures = {}
    with picture_style():
        if len(ids) > 2:
            figures["task_map"] = _task_map(diagnosis.tasks, *_principal_components(_directions(network, ids)))
        figures["singular_values"] = _singular_values(diagnosis, *_spectra(network, ids, diagnosis))
        figures["update_norms"] = _update_norms(diagnosis, network.positions)
        if len(ids) > 1:
            figures["cosines"] = _cosines(diagnosis)
    return figures


@torch.no_grad()
def _directions(network: HyperAdapterNetwork, ids: Tensor) -> Tensor:
    embeddings = network.task_embedding(ids.to(network.hypernetwork.layer_embedding.device))
    return nn.functional.normalize(embeddings.double().cpu(), dim=1)


def _principal_components(directions: Tensor) -> tuple[Array, Array]:
    """Coordinates of shape (tasks, 2) and the two components' shares of the variance."""
    left, values, _ = torch.linalg.svd(directions - directions.mean(0), full_matrices=False)
    total = float(values.square().sum())
    if total < _ROUNDING:
        return np.zeros((len(directions), 2)), np.zeros(2)
    coordinates = nn.functional.pad(left * values, (0, 1))[:, :2]
    # Their signs are free; the largest entry decides, so that they are always the same.
    largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    coordinates = coordinates * torch.where(largest < 0, -1.0, 1.0)
    return coordinates.numpy(), (coordinates.square().sum(0) / total).numpy()


def _task_map(tasks: Sequence[str], coordinates: Array, shares: Array) -> Figure:
    figure = Figure(figsize=(WIDTH, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(coordinates[:, 0], coordinates[:, 1], color=BLUE, s=30, alpha=0.8, linewidths=0)
    extent = np.ptp(coordinates, axis=0).max()
    near = (abs(coordinates[:, None] - coordinates) <= extent * np.array([0.3, 0.05])).all(-1)
    named: list[int] = []
    for place in range(len(tasks)):
        if len(tasks) <= _MAX_NAMES or not near[place, named].any():
            named.append(place)
    for place in named:
        task, point = tasks[place], coordinates[place]
        # Of two names that would meet, the lower point has its own below.
        is_below = any(near[place, other] and (coordinates[other, 1], -other) > (point[1], -place) for other in named)
        is_right = point[0] - coordinates[:, 0].min() > 0.6 * extent
        offset, side = (-5 if is_right else 5, -11 if is_below else 4), "right" if is_right else "left"
        axes.annotate(label(task), point, offset, textcoords="offset points", ha=side, fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second principal component ({shares[1]:.0%} of the variance)")
    axes.set_title(f"Map of {len(tasks)} tasks by the direction of their embedding")
    return figure


@torch.no_grad()
def _spectra(network: HyperAdapterNetwork, ids: Tensor, diagnosis: Diagnosis) -> tuple[Array, Array]:
    """Relative singular values before and after normalisation, shape (positions, r), NaN where there are fewer."""
    known = {position.name: index for index, position in enumerate(network.positions)}
    base_norms = network.position_norms
    before: list[Tensor] = []
    after: list[Tensor] = []
    for name, factors in network(ids).items():
        base_norm = float(base_norms[known[name]])
        scaling = 1.0 if network.config.has_gain else network.positions[known[name]].scaling
        core = torch.full_like(factors.core[..., :1, :1], scaling, dtype=torch.float64)
        raw = spectrum(factors._replace(core=core)).cpu()
        for values, rows in ((raw, before), (diagnosis.singular_values[name], after)):
            rows.append(values.where(values > _ROUNDING * values[:, :1], 0.0).mean(0) / base_norm)
    return _padded(before), _padded(after)


def _padded(rows: Sequence[Tensor]) -> Array:
    padded: Array = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=math.nan).numpy()
    return padded


def _singular_values(diagnosis: Diagnosis, before: Array, after: Array) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    indices = np.arange(1.0, before.shape[1] + 1)
    draw_spread(axes, indices, before, "before normalisation: B·A", ORANGE, "s--")
    draw_spread(axes, indices, after, "after normalisation: ΔW", BLUE, "o-")
    use_log_scale(axes)
    axes.grid(alpha=0.3)
    axes.set_xlim(0.8, len(indices) + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("index of the singular value, the largest first")
    axes.set_ylabel("singular value / ‖W₀‖")
    tasks, positions = counted(len(diagnosis.tasks), "task"), counted(len(before), "position")
    axes.set_title(f"Singular values, mean of {tasks}: median and range over {positions}{_zero_note(diagnosis)}")
    axes.legend()
    return figure


def _update_norms(diagnosis: Diagnosis, positions: Sequence[Position]) -> Figure:
    """Rows are tasks; columns are positions, all layers of a module side by side."""
    modules: dict[str, list[Position]] = {}
    for position in positions:
        modules.setdefault(position.module, []).append(position)
    groups = [sorted(group, key=lambda one: one.layer_index or 0) for group in modules.values()]
    order = [diagnosis.positions.index(position.name) for group in groups for position in group]
    norms = np.ma.masked_equal(diagnosis.norms[order].T.numpy(), 0)
    figure = Figure(figsize=(WIDTH, min(2.6 + 0.24 * len(norms), 9)), layout="constrained")
    high, low = (float(norms.max()), float(norms.min())) if norms.count() else (1.0, 0.1)
    # One decade at least, lest nearly equal norms look different; three at most; and room for a tick at a bound.
    scale = LogNorm(min(max(low, high / 1000), high / 10), 1.02 * high)
    axes = _draw_matrix(figure, norms, diagnosis.tasks, "‖ΔW‖ / ‖W₀‖", cmap="viridis", norm=scale)
    sizes = np.array([len(group) for group in groups])
    ends = sizes.cumsum() - 0.5
    for end in ends[:-1]:
        axes.axvline(end, color="white", linewidth=2 if len(groups) <= _MAX_NAMES else 0.5)
    name_ticks(axes.xaxis, _endings(list(modules)), (ends - sizes / 2).tolist())
    axes.set_xlabel(f"module{_layers_text(groups) if sizes.max() > 1 else ''}")
    axes.set_title(f"Size of each task's update, relative to the base weight{_zero_note(diagnosis)}")
    return figure


def _cosines(diagnosis: Diagnosis) -> Figure:
    count = len(diagnosis.tasks)
    figure = Figure(figsize=(WIDTH, min(3 + 0.36 * count, 7)), layout="constrained")
    cosines = np.ma.masked_invalid(diagnosis.cosines.numpy())
    axes = _draw_matrix(figure, cosines, diagnosis.tasks, "cosine", cmap="RdBu_r", vmin=-1, vmax=1)
    name_ticks(axes.xaxis, diagnosis.tasks)
    for (row, column), value in np.ndenumerate(cosines.data) if count <= _MAX_VALUES else ():
        text = f"{value:z.2f}" if math.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    note = "" if diagnosis.is_zero else f"; the task explains {diagnosis.share:.0%} of them"
    axes.set_title(f"Cosines between the tasks' updates{note}{_zero_note(diagnosis)}")
    return figure


def _draw_matrix(figure: Figure, values: Array, tasks: Sequence[str], name: str, **look: Any) -> Axes:
    """Axes with a row for each task; masked values are grey."""
    axes = figure.subplots()
    axes.set_facecolor(_NO_VALUE)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **look)
    grey = "; grey: update of zero" if np.ma.is_masked(values) else ""
    ticks: dict[str, Any] = {"ticks": LogLocator(subs=FINE_TICKS), "format": "{x:g}"} if "norm" in look else {}
    figure.colorbar(image, ax=axes, pad=0.02, label=f"{name}{grey}", **ticks).minorticks_off()
    name_ticks(axes.yaxis, tasks)
    axes.spines[:].set_visible(False)
    return axes


def _endings(modules: Sequence[str]) -> list[str]:
    """The fewest last components of each path that tell it from the others."""
    paths = [module.split(".") for module in modules]
    endings = []
    for path in paths:
        lengths = (n for n in range(1, len(path)) if sum(other[-n:] == path[-n:] for other in paths) == 1)
        ending = path[-next(lengths, len(path)) :]
        if len(ending) > 4:
            ending = [f"{ending[0]}…{ending[-2]}", ending[-1]]
        endings.append(".".join(ending).removeprefix("*."))
    return endings


def _layers_text(groups: Sequence[Sequence[Position]]) -> str:
    layers = [[position.layer_index or 0 for position in group] for group in groups]
    first, last = layers[0][0], layers[0][-1]
    is_regular = all(group == list(range(first, last + 1)) for group in layers)
    return f"; within each, {f'layers {first} to {last}' if is_regular else 'its layers'} from left to right"


def _zero_note(diagnosis: Diagnosis) -> str:
    return "\nAll updates are zero: the adapter is untrained." if diagnosis.is_zero else ""
