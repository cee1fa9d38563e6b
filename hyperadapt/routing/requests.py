"""What a caller asks for: tasks by name or id, or task embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperadapt.tasks.embedding import plain_size

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
