"""The tasks of an adapter as a table: a row for each, from which the embedding and the configuration are made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from hyperadapt.config.checks import check_number, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import check_description
from hyperadapt.tasks.embedding import TaskEmbedding
from hyperadapt.tasks.encoders import encode_like
from hyperadapt.tasks.ids import resolve_task_ids

# Of the known tasks, how many are tried as starting points for a new one.
MAX_STARTS = 64

Description = str | Sequence[str]
Encoder = str | Callable[[list[str]], Tensor] | None


@dataclass(frozen=True)
class TaskRow:
    """One task: its learned vector, the vectors of its descriptions, or both."""

    name: str
    source: str
    description: str | list[str] | None = None
    learned: Tensor | None = None
    text_vectors: Tensor | None = None


@dataclass(frozen=True)
class TaskTable:
    """The tasks as a configuration lists them and an embedding knows them; every change gives a new table."""

    config: HyperAdapterConfig
    embedding: TaskEmbedding

    def appended(self, row: TaskRow) -> TaskTable:
        """With one more task."""
        return self._of([*self._rows(), row])

    def without(self, name: str) -> TaskTable:
        """Without a task; the ids of those after it become smaller by one."""
        rows, task_id = self._rows(), self._id(name)
        if len(rows) == 1:
            raise ValueError(f"Task {name!r} cannot be removed: it is the only task.")
        if self.config.default_task == name:
            raise ValueError(
                f"Task {name!r} cannot be removed: it is the default task; set default_task of the configuration to "
                "another one."
            )
        return self._of(rows[:task_id] + rows[task_id + 1 :])

    def renamed(self, name: str, new_name: str) -> TaskTable:
        """With another name for a task, whose id stays."""
        rows, task_id = self._rows(), self._id(name)
        self.check_new_name(new_name)
        rows[task_id] = replace(rows[task_id], name=new_name)
        return self._of(rows, default_task=new_name if self.config.default_task == name else self.config.default_task)

    def row_between(self, name: str, weights: Mapping[str, float]) -> TaskRow:
        """A task whose embedding is the weighted sum of others' directions."""
        self.check_new_name(name)
        if not weights:
            raise ValueError(f"interpolate_tasks({name!r}) got no weights. Pass a dict from known task to weight.")
        for task, weight in weights.items():
            check_number(f"weights[{shown(task)}]", weight, "a finite number", lambda value: True)
        directions = self._directions(resolve_task_ids(list(weights), self.config.task_names))
        factors = torch.tensor(list(weights.values()), dtype=directions.dtype, device=directions.device)
        embedding = factors @ directions
        # Entries of directions are of order 1; a few roundings of each term are left of those that cancel.
        if float(embedding.abs().max()) <= 8 * torch.finfo(embedding.dtype).eps * float(factors.abs().sum()):
            raise ValueError(f"weights={shown(dict(weights))} cancel, so that no direction is left. Change them.")
        return TaskRow(name, "learned", None, embedding)

    def vectors_of(self, description: Description, text_encoder: Encoder) -> Tensor:
        """Vectors ``(descriptions, text_embedding_dim)`` of a new description, by the adapter's own encoder."""
        if self.embedding.is_all_learned:
            raise ValueError(
                f"This adapter was trained without descriptions (task_embedding='learned'), so the description "
                f"{shown(description)} means nothing to it. Pass examples= or embedding=, or train it with "
                "task_embedding='text' or 'both'."
            )
        texts = [description] if isinstance(description, str) else list(description)
        return encode_like(self.config, texts, self.embedding.text_vectors[0], text_encoder)

    @torch.no_grad()
    def embed(self, description: Description, text_encoder: Encoder) -> Tensor:
        """The task embedding ``(task_embedding_dim,)`` of a description."""
        check_description("(new)", description)
        vectors = self.vectors_of(description, text_encoder).to(self.embedding.text_vectors.device)
        return self.embedding.project(rms_norm(vectors, vectors.shape[-1:]).sum(0))

    def starts(self, description: Description | None, text_encoder: Encoder) -> Tensor:
        """Starting points ``(starts, task_embedding_dim)`` for a new task: known ones, their mean, the description."""
        ids = torch.arange(len(self.config.tasks))
        directions = self._directions(ids[:: -(-len(ids) // MAX_STARTS)])
        starts = [directions, directions.mean(0, keepdim=True)]
        if description is not None and not self.embedding.is_all_learned:
            starts.append(self.embed(description, text_encoder)[None])
        return torch.cat(starts)

    def check_new_name(self, name: object) -> None:
        """Refuse a name that is no text, empty or taken."""
        if not isinstance(name, str):
            raise TypeError(f"The name of a task must be a string, not {shown(name)} ({type(name).__name__}).")
        if not name.strip():
            raise ValueError(f"The name of a task is {shown(name)}; write a non-empty name.")
        if name in self.config.tasks:
            raise ValueError(f"There already is a task {name!r}. Choose another name, or remove_task({name!r}) first.")

    def checked_embedding(self, embedding: object) -> Tensor:
        """An embedding that a caller made, shape ``(task_embedding_dim,)``, detached."""
        dim = self.config.task_embedding_dim
        if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
            kind = f"a tensor of dtype {embedding.dtype}" if isinstance(embedding, Tensor) else type(embedding).__name__
            raise TypeError(f"embedding is {kind}, but must be a floating-point tensor of shape ({dim},).")
        if embedding.shape != (dim,):
            raise ValueError(
                f"embedding has shape {tuple(embedding.shape)}, but must have shape ({dim},), task_embedding_dim of "
                "the configuration."
            )
        if not embedding.isfinite().all() or not embedding.any():
            raise ValueError("embedding is zero or not finite; only a direction can be an embedding.")
        return embedding.detach()

    def _id(self, name: str) -> int:
        return int(resolve_task_ids(name, self.config.task_names))

    @torch.no_grad()
    def _directions(self, task_ids: Tensor) -> Tensor:
        known = self.embedding.text_vectors if self.embedding.weight is None else self.embedding.weight
        embeddings = self.embedding(task_ids.to(known.device))
        return rms_norm(embeddings, embeddings.shape[-1:])

    def _rows(self) -> list[TaskRow]:
        config, embedding = self.config, self.embedding
        counts = [len(descriptions) for descriptions in config.embedded_descriptions if descriptions]
        learned = iter(() if embedding.weight is None else embedding.weight.detach())
        vectors = iter(() if embedding.is_all_learned else torch.split(embedding.text_vectors, counts))
        return [
            TaskRow(
                name,
                source,
                (config.task_descriptions or {}).get(name),
                None if source == "text" else next(learned),
                None if source == "learned" else next(vectors),
            )
            for name, source in zip(config.tasks, config.task_sources, strict=True)
        ]

    def _of(self, rows: Sequence[TaskRow], **changes: Any) -> TaskTable:
        """The table of these rows; what fails, fails before anything has changed."""
        old = self.embedding
        has_text = any(row.source != "learned" for row in rows)
        if not has_text:
            changes |= {"text_encoder": None, "text_encoder_revision": None, "text_embedding_dim": None}
        config = self.config.replaced(
            tasks=[row.name for row in rows],
            task_descriptions={row.name: row.description for row in rows if row.description} or None,
            task_embedding={row.name: row.source for row in rows},
            **changes,
        )
        counts = [0 if row.text_vectors is None else len(row.text_vectors) for row in rows]
        new = TaskEmbedding(config.task_sources, counts, config.task_embedding_dim, config.text_embedding_dim)
        new.train(old.training)
        learned = [row.learned for row in rows if row.learned is not None]
        if learned:
            like = old.text_projection.weight if old.weight is None else old.weight
            weight = torch.stack([vector.to(like) for vector in learned])
            new.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
        if has_text:
            new.text_projection = old.text_projection
            vectors = [row.text_vectors for row in rows if row.text_vectors is not None]
            new.text_vectors = torch.cat([one.to(old.text_vectors.device) for one in vectors])
            new.has_vectors = True
        return TaskTable(config, new)
