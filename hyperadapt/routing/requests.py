"""What a caller asks for: tasks by name or id, or task embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hyperadapt.config.checks import shown
from hyperadapt.tasks.embedding import plain_size
from hyperadapt.tasks.ids import can_read, resolve_task_ids

Tasks = str | Sequence[str] | Tensor


@dataclass(frozen=True)
class Request:
    """One name for all rows, one per row, or ids ``(batch,)``; or embeddings ``(batch, dim)`` or ``(dim,)``.

    ``task_rows`` tells for parts of the model, by name, to which row each element of what they get belongs.
    """

    tasks: Tasks | None = None
    task_embeddings: Tensor | None = None
    task_rows: Mapping[str, Sequence[int] | Tensor] | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None and self.task_embeddings is not None:
            raise ValueError(
                f"Both tasks={self.tasks!r} and task_embeddings of shape {tuple(self.task_embeddings.shape)} were "
                "given; pass one of the two."
            )

    @property
    def is_empty(self) -> bool:
        """Whether the caller asked for nothing."""
        return self.tasks is None and self.task_embeddings is None

    @property
    def num_rows(self) -> int | None:
        """Number of rows asked for; None if one task is meant for all."""
        if self.task_embeddings is not None:
            return None if self.task_embeddings.ndim == 1 else self.task_embeddings.shape[0]
        if isinstance(self.tasks, Tensor):
            return self.tasks.shape[0]
        return None if self.tasks is None or isinstance(self.tasks, str) else len(self.tasks)

    def only_task(self, task_names: Sequence[str]) -> str:
        """The task that ``use_tasks`` means for all rows; refused where it means no task or several."""
        if self.tasks is None:
            raise ValueError(
                "use_tasks asks for task_embeddings, but one task must be in force, as for merging. Make a task of "
                "an embedding with add_task(name, embedding=...), and open use_tasks with its name."
            )
        tasks = self.tasks.cpu() if isinstance(self.tasks, Tensor) else self.tasks
        ids = resolve_task_ids(tasks, task_names).reshape(-1).tolist()
        names: list[str] = list(dict.fromkeys(task_names[one] for one in ids))
        if len(names) > 1:
            raise ValueError(
                f"use_tasks asks for the tasks {shown(names)}, but one must be in force for all rows, as for merging. "
                "Open use_tasks with one name, or leave it and pin a task with set_task."
            )
        return names[0]

    def rows_told(self, position: str, size: int) -> Tensor | None:
        """The row of each of ``size`` elements that a module gets; None if nothing was told of it."""
        parts = [part for part in self.task_rows or {} if f".{part}." in f".{position}."]
        if not parts or self.task_rows is None:
            return None
        told = torch.as_tensor(self.task_rows[max(parts, key=len)])
        if told.ndim != 1 or told.is_floating_point() or not len(told) or size % len(told):
            raise ValueError(f"task_rows has shape {tuple(told.shape)} for it, which does not divide {size} elements")
        if int(told.min()) < 0 or (self.num_rows is not None and int(told.max()) >= self.num_rows):
            raise ValueError(f"task_rows has {told.tolist()} for it, but rows are from 0 to {(self.num_rows or 1) - 1}")
        return told.repeat_interleave(size // len(told))

    def embeddings(self, task_embedding_dim: int) -> Tensor | None:
        """The embeddings in two dimensions, checked; None if tasks were asked for."""
        given = self.task_embeddings
        if given is None:
            return None
        if not given.is_floating_point():
            raise TypeError(
                f"task_embeddings has dtype {given.dtype}, but embeddings are floating point. Task ids go into tasks=."
            )
        # Whole shapes are not compared: a graph for batches of any size would be bound to sizes other than this one.
        if given.ndim == 1 and given.shape[0] == task_embedding_dim:
            return plain_size(given[None])
        if given.ndim != 2 or not given.shape[0] or given.shape[1] != task_embedding_dim:
            raise ValueError(
                f"task_embeddings has shape {tuple(given.shape)}, but must have shape (batch, {task_embedding_dim}), "
                f"or ({task_embedding_dim},) for all rows."
            )
        return plain_size(given)


def distinct_tasks(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, bool]:
    """The tasks to generate for, which of them each row uses, and whether those are just its own, in order."""
    is_known = can_read(task_ids)
    if is_known:
        distinct, rows = torch.unique(task_ids, return_inverse=True)
        if len(distinct) < task_ids.numel():
            return distinct, rows, False
    # Otherwise the number of tasks cannot depend on the values: as many as there may be distinct ones. Nor may a graph
    # for batches of any size depend on that of its example.
    if is_known or task_ids.ndim == 0 or statically_known_true(task_ids.shape[0] < num_tasks):
        return task_ids.reshape(-1), torch.arange(task_ids.numel(), device=task_ids.device), True
    return torch.arange(num_tasks, device=task_ids.device), task_ids, False
