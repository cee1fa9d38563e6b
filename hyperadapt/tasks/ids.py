"""Tasks as users name them, and their ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadapt.config.checks import shown


def can_read(task_ids: Tensor) -> bool:
    """Whether the values of task ids can be looked at without harm.

    Not while a graph is traced, which must not depend on them, and not on other devices than the CPU, for whose work in
    progress the host would have to wait.
    """
    return task_ids.device.type == "cpu" and not torch.compiler.is_compiling()


def resolve_task_ids(tasks: str | Sequence[str] | Tensor, task_names: Sequence[str]) -> Tensor:
    """int64 ids: shape ``()`` for one name for all rows, else ``(batch,)``; a task's id is its place in the names.

    Ids that ``can_read`` says are not to be read fail where they are looked up, which those of an only task never are.
    """
    if isinstance(tasks, Tensor):
        return _checked_task_ids(tasks, task_names)
    places = {name: place for place, name in enumerate(task_names)}
    if isinstance(tasks, str):
        return torch.tensor(_task_id(tasks, places), device="cpu")
    if not isinstance(tasks, Sequence):
        raise TypeError(
            f"tasks={tasks!r} must be a task name, a list of names (one per row) or an integer tensor of ids, not "
            f"{type(tasks).__name__}."
        )
    if not tasks:
        raise ValueError("tasks is empty; pass one task per row of the batch, or one name for all rows.")
    return torch.tensor([_task_id(task, places) for task in tasks], device="cpu")


def _task_id(task: object, places: dict[str, int]) -> int:
    if not isinstance(task, str):
        raise TypeError(
            f"A list of tasks must hold names, but holds {task!r} ({type(task).__name__}). Pass ids as an integer "
            "tensor."
        )
    if task not in places:
        raise ValueError(f"Unknown task {task!r}. Known tasks: {shown(list(places))}.")
    return places[task]


def _checked_task_ids(task_ids: Tensor, task_names: Sequence[str]) -> Tensor:
    if task_ids.dtype == torch.bool or task_ids.is_floating_point() or task_ids.is_complex():
        raise TypeError(f"tasks is a tensor of dtype {task_ids.dtype}; task ids must be integers.")
    if task_ids.ndim != 1 or not task_ids.shape[0]:
        raise ValueError(
            f"tasks is a tensor of shape {tuple(task_ids.shape)}; task ids must have shape (batch,), one per row."
        )
    if not can_read(task_ids):
        # Look-ups refuse ids past the end, but would count negative ones from there.
        return torch.where(task_ids < 0, len(task_names), task_ids.long())
    wrong = (task_ids < 0) | (task_ids >= len(task_names))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Task id {int(task_ids[row])} in row {row} is out of range: there are {len(task_names)} tasks, "
            f"{shown(list(task_names))}."
        )
    return task_ids.long()
