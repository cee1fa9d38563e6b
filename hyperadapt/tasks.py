"""Tasks as users name them, and their learned embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapt.validation import shown


class TaskEmbedding(nn.Module):
    """A learned embedding per task.

    Entries start as independent standard normals, so that tasks start as nearly orthogonal
    directions; the hypernetwork reads only an embedding's direction (see ``Hypernetwork``).

    Args:
        num_tasks: Number of tasks.
        task_embedding_dim: Size of an embedding.
    """

    def __init__(self, num_tasks: int, task_embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, task_embedding_dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        """Look up task embeddings.

        Args:
            task_ids: Task ids, shape ``(n,)``, int64.

        Returns:
            Embeddings, shape ``(n, task_embedding_dim)``.
        """
        return nn.functional.embedding(task_ids, self.weight)


def resolve_task_ids(tasks: str | Sequence[str] | Tensor, task_names: Sequence[str]) -> Tensor:
    """Turn tasks as users name them into task ids.

    Args:
        tasks: One name for all rows, one name per row, or an integer tensor of ids ``(batch,)``.
        task_names: The known tasks; a task's id is its place here.

    Returns:
        int64 ids: shape ``()`` for one name for all rows, else ``(batch,)``.

    Raises:
        TypeError: If `tasks` is of another type.
        ValueError: If a name is unknown, an id is out of range, or there is no row.
    """
    if isinstance(tasks, Tensor):
        return _check_task_ids(tasks, task_names)
    if isinstance(tasks, str):
        return torch.tensor(_task_id(tasks, task_names))
    if not isinstance(tasks, Sequence):
        raise TypeError(
            f"tasks={tasks!r} must be a task name, a list of names (one per row) or an integer tensor of ids, not "
            f"{type(tasks).__name__}."
        )
    if not tasks:
        raise ValueError("tasks is empty; pass one task per row of the batch, or one name for all rows.")
    return torch.tensor([_task_id(task, task_names) for task in tasks])


def _task_id(task: object, task_names: Sequence[str]) -> int:
    if not isinstance(task, str):
        raise TypeError(
            f"A list of tasks must hold names, but holds {task!r} ({type(task).__name__}). Pass ids as an integer "
            "tensor."
        )
    try:
        return task_names.index(task)
    except ValueError:
        raise ValueError(f"Unknown task {task!r}. Known tasks: {shown(list(task_names))}.") from None


def _check_task_ids(task_ids: Tensor, task_names: Sequence[str]) -> Tensor:
    if task_ids.dtype == torch.bool or task_ids.is_floating_point() or task_ids.is_complex():
        raise TypeError(f"tasks is a tensor of dtype {task_ids.dtype}; task ids must be integers.")
    if task_ids.ndim != 1 or not len(task_ids):
        raise ValueError(
            f"tasks is a tensor of shape {tuple(task_ids.shape)}; task ids must have shape (batch,), one per row."
        )
    if torch.compiler.is_compiling():
        # The values are not known. Look-ups refuse ids past the end, but would count negative ones from there.
        return torch.where(task_ids < 0, len(task_names), task_ids.long())
    wrong = (task_ids < 0) | (task_ids >= len(task_names))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Task id {int(task_ids[row])} in row {row} is out of range: there are {len(task_names)} tasks, "
            f"{shown(list(task_names))}."
        )
    return task_ids.long()
