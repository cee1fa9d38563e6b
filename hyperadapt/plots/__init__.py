"""Pictures of an adapter: its tasks, the updates that it generates for them, and the course of its training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hyperadapt.config.checks import check_choice, checked_names
from hyperadapt.diagnosis import Diagnosis, measure
from hyperadapt.files import whole_folder
from hyperadapt.tuner.active import active_network

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Pictures are drawn by matplotlib, which is not installed. Install it with pip install "hyperadapt[plot]".'
    ) from error

from hyperadapt.plots.adapter import adapter_figures
from hyperadapt.plots.axes import picture_style
from hyperadapt.plots.training import training_figure

__all__ = ["draw", "plot"]

# Nothing that changes from run to run goes into a file.
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
_DPI = 150


def plot(  # noqa: DOC503
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    log_history: Sequence[Mapping[str, Any]] | None = None,
    chosen_by: str | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Write the pictures that ``draw`` makes; the model is not changed.

    The same model gives the same bytes. The files appear all complete or not at all; other files in the folder, among
    them pictures of an earlier call that this one does not draw, are left alone.

    Args:
        model: A ``PeftModel`` with a hyperadapter, in any mode, or the ``network`` of a ``LoraGenerator``.
        directory: Folder to write to; made if missing.
        tasks: As in ``draw``.
        log_history: As in ``draw``.
        chosen_by: As in ``draw``.
        formats: ``"png"`` (1200 pixels wide), ``"svg"`` or both.

    Returns:
        The files ``<name>.<format>``, in the order of ``draw``.

    Raises:
        TypeError: As in ``draw``, or if `formats` is no list.
        ValueError: As in ``draw``, or if `formats` is empty or holds an unknown one, or `directory` is a file.
    """
    kinds = list(dict.fromkeys(checked_names("formats", formats)))
    for kind in kinds:
        check_choice("formats", kind, tuple(_METADATA))
    if not kinds:
        raise ValueError(f"formats={formats!r} is empty, so no file would be written. Name 'png', 'svg' or both.")
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(f"directory={str(directory)!r} is a file; pass a folder.")
    figures = draw(model, tasks=tasks, log_history=log_history, chosen_by=chosen_by)
    with whole_folder(folder) as new:
        save_figures(figures, new, kinds)
    return [folder / f"{name}.{kind}" for name in figures for kind in kinds]


def draw(  # noqa: DOC502
    model: nn.Module,
    *,
    tasks: Sequence[str] | None = None,
    log_history: Sequence[Mapping[str, Any]] | None = None,
    chosen_by: str | None = None,
) -> dict[str, Figure]:
    """Draw the active adapter; the model is not changed.

    - ``task_map``: principal components of the directions of the tasks' embeddings; left out below three tasks, which
      would always lie on a line.
    - ``singular_values``: those of B·A, times ``lora_alpha / r`` (times 1 where a gain follows the normalisation), and
      of the update ΔW, by index; means over tasks, then median and range over positions.
    - ``update_norms``: ‖ΔW‖_F of every task at every position.
    - ``cosines``: cosines between the tasks' updates; left out for a single task.
    - ``training``: training loss, overall and by task, the metric that chose the checkpoint, and norm of the gradient,
      overall and by position, as logged; left out without `log_history`, or if that holds no training loss.

    Norms and singular values are relative to ‖W₀‖_F of the base weight. The pictures also say what ``diagnose`` warns
    of, that all updates are zero or hardly depend on the task; here that is no warning.

    Args:
        model: A ``PeftModel`` with a hyperadapter, in any mode, or the ``network`` of a ``LoraGenerator``.
        tasks: Names of the tasks to show; None for all.
        log_history: What a trainer logged: ``trainer.state.log_history``.
        chosen_by: The metric that chose the checkpoint, as in ``metric_for_best_model``; None for the mean accuracy of
            an evaluation, or its loss where there is none.

    Returns:
        Figures by name, in this order.

    Raises:
        TypeError: If `tasks` holds anything but names, or `log_history` is not what a trainer logged.
        ValueError: If a task is unknown or named twice, several adapters are active, or an update is not finite.
    """
    return make_figures(model, measure(model, tasks), log_history, chosen_by)


def make_figures(
    model: nn.Module,
    diagnosis: Diagnosis,
    log_history: Sequence[Mapping[str, Any]] | None,
    chosen_by: str | None = None,
) -> dict[str, Figure]:
    """As ``draw``, of the tasks that were measured."""
    figures = adapter_figures(active_network(model)[1], diagnosis)
    training = None if log_history is None else training_figure(log_history, diagnosis.tasks, chosen_by)
    return figures if training is None else figures | {"training": training}


def save_figures(figures: Mapping[str, Figure], folder: Path, kinds: Sequence[str]) -> None:
    """Write figures as ``<name>.<kind>`` into a folder that is there."""
    with picture_style(), warnings.catch_warnings():
        # A task's name may be in any script; what the font lacks is shown as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        for name, figure in figures.items():
            for kind in kinds:
                figure.savefig(folder / f"{name}.{kind}", dpi=_DPI, metadata=_METADATA[kind])
