"""Task embeddings: learned, from text, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

# How often training leaves out the learned part where a task has text too: otherwise the text would go unused, and a
# description alone would mean nothing.
TEXT_ALONE = 0.5


class TaskEmbedding(nn.Module):
    """The embedding of each task: a learned vector, a projection of its description's vector, or their sum.

    Learned vectors start as independent standard normals, so that tasks start as nearly orthogonal
    directions; the hypernetwork reads only an embedding's direction (see ``Hypernetwork``). Where a task
    has text too, its learned vector starts at zero, and training leaves it out half of the time, so that the text
    alone stands for the task as well as it can. Of several descriptions, training draws one for each forward pass; in
    evaluation their mean counts. ``num_descriptions`` is 0 for learned tasks; ``text_embedding_dim`` is None if no task
    has text.
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
        """Fill in the descriptions' vectors ``(descriptions, text_embedding_dim)``, those of the first task first."""
        self.text_vectors = text_vectors.to(self.text_vectors.device)
        self.has_vectors = True

    def forward(self, task_ids: Tensor) -> Tensor:
        """Embeddings ``(n, task_embedding_dim)`` of task ids ``(n,)``, int64."""
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
                left_out = torch.rand(task_ids.shape[0], device=task_ids.device) < TEXT_ALONE
                is_learned = is_learned & ~(left_out & _look_up(self._has_both, task_ids))
            learned = embedding(_look_up(self._learned_row, task_ids), self.weight)
            embeddings = embeddings + torch.where(is_learned[:, None], learned, 0.0)
        return embeddings

    def project(self, vectors: Tensor) -> Tensor:
        """Embeddings ``(..., task_embedding_dim)`` of descriptions' vectors; only their direction counts."""
        vectors = rms_norm(vectors.to(self.text_projection.weight.dtype), vectors.shape[-1:])
        projected: Tensor = self.text_projection(vectors)
        return projected

    def _vectors(self, task_ids: Tensor, one: bool) -> Tensor:
        """A vector of each task's text, of one description or the sum over all; any for tasks without."""
        first, count = _look_up(self._first, task_ids), _look_up(self._count, task_ids)
        last = len(self.text_vectors) - 1
        if one:
            choice = (torch.rand(task_ids.shape[0], device=task_ids.device) * count).long()
            return self.text_vectors[(first + choice).clamp(max=last)]
        steps = torch.arange(self._most, device=task_ids.device)
        vectors = self.text_vectors[(first[:, None] + steps).clamp(max=last)]
        directions = rms_norm(vectors, vectors.shape[-1:])
        return torch.where((steps < count[:, None])[:, :, None], directions, 0.0).sum(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.has_vectors = self.has_vectors or f"{prefix}text_vectors" in state_dict


def _look_up(values: Tensor, task_ids: Tensor) -> Tensor:
    return values.to(task_ids.device, non_blocking=True)[task_ids]
