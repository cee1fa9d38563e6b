"""What a caller asks for: tasks by name or id, or task embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Tasks = str | Sequence[str] | Tensor


@dataclass(frozen=True)
class Request:
    """One name for all rows, one per row, or ids ``(batch,)``; or embeddings ``(batch, dim)`` or ``(dim,)``."""

    tasks: Tasks | None = None
    task_embeddings: Tensor | None = None

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
            return None if self.task_embeddings.ndim == 1 else len(self.task_embeddings)
        return None if self.tasks is None or isinstance(self.tasks, str) else len(self.tasks)

    def embeddings(self, task_embedding_dim: int) -> Tensor | None:
        """The embeddings in two dimensions, checked; None if tasks were asked for."""
        given = self.task_embeddings
        if given is None:
            return None
        if not given.is_floating_point():
            raise TypeError(
                f"task_embeddings has dtype {given.dtype}, but embeddings are floating point. Task ids go into tasks=."
            )
        if given.shape == (task_embedding_dim,):
            return given[None]
        if given.ndim != 2 or not len(given) or given.shape[1] != task_embedding_dim:
            raise ValueError(
                f"task_embeddings has shape {tuple(given.shape)}, but must have shape (batch, {task_embedding_dim}), "
                f"or ({task_embedding_dim},) for all rows."
            )
        return given
