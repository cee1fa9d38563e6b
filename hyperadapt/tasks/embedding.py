"""Tasks as users name them, and their embeddings: learned, from text, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

from hyperadapt.config.checks import shown

# How often training leaves out the learned part where a task has text too: otherwise the text would go unused, and a
# description alone would mean nothing.
TEXT_ALONE = 0.5


class TaskEmbedding(nn.Module):
    """The embedding of each task: a learned vector, a projection of its description's vector, or their sum.

    Learned vectors start as independent standard normals, so that tasks start as nearly orthogonal
    directions; the hypernetwork reads only an embedding's direction (see ``Hypernetwork``). Where a task
    has text too, its learned vector starts at zero, and training leaves it out half of the time, so that the text
    alone stands for the task as well as it can. Of several descriptions, training draws one for each forward pass; in
    evaluation their mean counts.

    Args:
        sources: ``"learned"``, ``"text"`` or ``"both"`` for each task.
        num_descriptions: Number of descriptions of each task; 0 for learned ones.
        task_embedding_dim: Size of an embedding.
        text_embedding_dim: Size of a description's vector; None if no task has text.
    """

    text_vectors: Tensor

    def __init__(
        self,
        sources: Sequence[str],
        num_descriptions: Sequence[int],
        task_embedding_dim: int,
        text_embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.is_all_learned = all(source == "learned" for source in sources)
        learned = [source != "text" for source in sources]
        if any(learned):
            start = torch.randn(sum(learned), task_embedding_dim)
            is_residual = torch.tensor(
                [source == "both" for source in sources if source != "text"], device=start.device
            )
            self.weight = nn.Parameter(start.masked_fill(is_residual[:, None], 0.0))
        else:
            # Without rows it would be a parameter that never gets a gradient.
            self.register_parameter("weight", None)
        # False until there are vectors: computed, or loaded.
        self.has_vectors = self.is_all_learned
        if self.is_all_learned:
            return
        assert text_embedding_dim is not None
        self.text_projection = nn.Linear(text_embedding_dim, task_embedding_dim, bias=False)
        # Of vectors with root mean square 1, it then makes embeddings with the same, as learned ones have.
        nn.init.normal_(self.text_projection.weight, std=text_embedding_dim**-0.5)
        self.register_buffer("text_vectors", torch.full((sum(num_descriptions), text_embedding_dim), torch.nan))
        # Plain tensors: they follow from the configuration, so no file should hold them.
        self._is_learned = torch.tensor(learned, device="cpu")
        self._learned_row = (self._is_learned.long().cumsum(0) - 1).clamp(min=0)
        self._has_both = torch.tensor([source == "both" for source in sources], device="cpu")
        self._count = torch.tensor(num_descriptions, device="cpu")
        self._first = self._count.cumsum(0) - self._count
        self._most = max(num_descriptions)

    def set_text_vectors(self, text_vectors: Tensor) -> None:
        """Fill in the descriptions' vectors.

        Args:
            text_vectors: Shape ``(descriptions, text_embedding_dim)``, all descriptions of the first task first.
        """
        self.text_vectors = text_vectors.to(self.text_vectors.device)
        self.has_vectors = True

    def forward(self, task_ids: Tensor) -> Tensor:
        """Look up task embeddings.

        Args:
            task_ids: Task ids, shape ``(n,)``, int64.

        Returns:
            Embeddings, shape ``(n, task_embedding_dim)``.

        Raises:
            RuntimeError: If the descriptions' vectors were to come from a file that was never loaded.
        """
        if self.is_all_learned:
            return embedding(task_ids, self.weight)
        if not self.has_vectors:
            raise RuntimeError(
                "This adapter has no vectors of its descriptions: its configuration, with text_embedding_dim given, is "
                "that of a saved adapter, whose weights were not loaded. Load it with PeftModel.from_pretrained; or "
                "compute them anew: config.replaced(text_embedding_dim=None, text_encoder=...)."
            )
        training = self.training and torch.is_grad_enabled()
        has_text = _look_up(self._count, task_ids) > 0
        text = self.project(self._vectors(task_ids, training))
        embeddings = torch.where(has_text[:, None], text, 0.0)
        if self.weight is not None:
            is_learned = _look_up(self._is_learned, task_ids)
            if training:
                left_out = torch.rand(len(task_ids), device=task_ids.device) < TEXT_ALONE
                is_learned = is_learned & ~(left_out & _look_up(self._has_both, task_ids))
            learned = embedding(_look_up(self._learned_row, task_ids), self.weight)
            embeddings = embeddings + torch.where(is_learned[:, None], learned, 0.0)
        return embeddings

    def project(self, vectors: Tensor) -> Tensor:
        """Embeddings of descriptions.

        Args:
            vectors: Vectors of descriptions, shape ``(..., text_embedding_dim)``; only the direction counts.

        Returns:
            Shape ``(..., task_embedding_dim)``.
        """
        vectors = rms_norm(vectors.to(self.text_projection.weight.dtype), vectors.shape[-1:])
        projected: Tensor = self.text_projection(vectors)
        return projected

    def _vectors(self, task_ids: Tensor, draw: bool) -> Tensor:
        """A vector of each task's text; any for tasks without."""
        first, count = _look_up(self._first, task_ids), _look_up(self._count, task_ids)
        last = len(self.text_vectors) - 1
        if draw:
            drawn = (torch.rand(len(task_ids), device=task_ids.device) * count).long()
            return self.text_vectors[(first + drawn).clamp(max=last)]
        steps = torch.arange(self._most, device=task_ids.device)
        vectors = self.text_vectors[(first[:, None] + steps).clamp(max=last)]
        directions = rms_norm(vectors, vectors.shape[-1:])
        return torch.where((steps < count[:, None])[:, :, None], directions, 0.0).sum(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.has_vectors = self.has_vectors or f"{prefix}text_vectors" in state_dict


def _look_up(values: Tensor, task_ids: Tensor) -> Tensor:
    return values.to(task_ids.device, non_blocking=True)[task_ids]


def can_read(task_ids: Tensor) -> bool:
    """Whether the values of task ids can be looked at without harm.

    Args:
        task_ids: The ids.

    Returns:
        False while a graph is traced, which must not depend on them, and on other devices than the CPU, for whose work
        in progress the host would have to wait.
    """
    return task_ids.device.type == "cpu" and not torch.compiler.is_compiling()


def resolve_task_ids(tasks: str | Sequence[str] | Tensor, task_names: Sequence[str]) -> Tensor:
    """Turn tasks as users name them into task ids.

    Args:
        tasks: One name for all rows, one name per row, or an integer tensor of ids ``(batch,)``.
        task_names: The known tasks; a task's id is its place here.

    Returns:
        int64 ids: shape ``()`` for one name for all rows, else ``(batch,)``.

    Raises:
        TypeError: If `tasks` is of another type.
        ValueError: If a name is unknown, an id is out of range, or there is no row. Ids that ``can_read`` says are not
            to be read fail where they are looked up, which those of an only task never are.
    """
    if isinstance(tasks, Tensor):
        return _check_task_ids(tasks, task_names)
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


def _check_task_ids(task_ids: Tensor, task_names: Sequence[str]) -> Tensor:
    if task_ids.dtype == torch.bool or task_ids.is_floating_point() or task_ids.is_complex():
        raise TypeError(f"tasks is a tensor of dtype {task_ids.dtype}; task ids must be integers.")
    if task_ids.ndim != 1 or not len(task_ids):
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
