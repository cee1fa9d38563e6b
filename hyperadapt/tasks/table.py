"""The tasks of an adapter as a table: a row for each, from which the embedding and the configuration are made anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from hyperadapt.config.checks import check_number, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.label_fields import Labels
from hyperadapt.config.task_fields import EXAMPLES, LEARNED, TEXT, check_description
from hyperadapt.randomness import randomness_kept
from hyperadapt.tasks.embedding import TaskEmbedding, plain_size
from hyperadapt.tasks.encoders import encode_like
from hyperadapt.tasks.examples import MAX_EXAMPLES
from hyperadapt.tasks.ids import resolve_task_ids

# Of the known tasks, how many are tried as starting points for a new one.
MAX_STARTS = 64

Description = str | Sequence[str]
Encoder = str | Callable[[list[str]], Tensor] | None


class TaskFactors(nn.ParameterDict):
    """Factors of a task's own; ``trains_alone`` if nothing else of the adapter is to train."""

    trains_alone: bool = False


@dataclass(frozen=True)
class TaskRow:
    """One task: its learned vector, the vectors of its descriptions, its examples, or two of these."""

    name: str
    source: str
    description: str | list[str] | None = None
    learned: Tensor | None = None
    text_vectors: Tensor | None = None
    # See ``ExampleRows.parts``.
    examples: tuple[Tensor, Tensor] | None = None
    labels: Labels | None = None
    own_factors: TaskFactors | None = None


@dataclass(frozen=True)
class TaskTable:
    """The tasks as a configuration lists them and an embedding knows them; every change gives a new table.

    Own factors are by the name of the task, in the configuration's order.
    """

    config: HyperAdapterConfig
    embedding: TaskEmbedding
    own_factors: Mapping[str, TaskFactors]

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
        left = rows[:task_id] + rows[task_id + 1 :]
        for kind, what in ((TEXT, "descriptions"), (EXAMPLES, "examples")):
            if rows[task_id].source in kind and not any(row.source in kind for row in left):
                warnings.warn(
                    f"Task {name!r} was the last one with {what}, and what reads {what} is gone with it. Keep the "
                    f"task, or the adapter's files from before, if new tasks are to come from {what}.",
                    stacklevel=3,
                )
        return self._of(left)

    def renamed(self, name: str, new_name: str) -> TaskTable:
        """With another name for a task, whose id stays."""
        rows, task_id = self._rows(), self._id(name)
        self.check_new_name(new_name)
        rows[task_id] = replace(rows[task_id], name=new_name)
        return self._of(rows, default_task=new_name if self.config.default_task == name else self.config.default_task)

    def with_own_factors(self, name: str, factors: TaskFactors) -> TaskTable:
        """With factors of its own for a task, which may not have any."""
        rows, task_id = self._rows(), self._id(name)
        if name in self.own_factors:
            raise ValueError(
                f"Task {name!r} has factors of its own already. Train them (set_trained_task({name!r})), or remove the "
                "task and add it anew."
            )
        rows[task_id] = replace(rows[task_id], own_factors=factors)
        return self._of(rows)

    def row_between(self, name: str, weights: Mapping[str, float]) -> TaskRow:
        """A task whose embedding is the weighted sum of others' directions."""
        self.check_new_name(name)
        if not weights:
            raise ValueError(f"interpolate_tasks({name!r}) got no weights. Pass a dict from known task to weight.")
        for task, weight in weights.items():
            check_number(f"weights[{shown(task)}]", weight, "a finite number", lambda value: True)
            if task in self.own_factors:
                raise ValueError(
                    f"weights names {shown(task)}, which has factors of its own, and those do not follow from an "
                    "embedding. Leave it out."
                )
        directions = self._directions(resolve_task_ids(list(weights), self.config.task_names))
        factors = torch.tensor(list(weights.values()), dtype=directions.dtype, device=directions.device)
        embedding = factors @ directions
        # Entries of directions are of order 1; a few roundings of each term are left of those that cancel.
        if float(embedding.abs().max()) <= 8 * torch.finfo(embedding.dtype).eps * float(factors.abs().sum()):
            raise ValueError(f"weights={shown(dict(weights))} cancel, so that no direction is left. Change them.")
        return TaskRow(name, "learned", None, plain_size(embedding))

    def vectors_of(self, description: Description, text_encoder: Encoder) -> Tensor:
        """Vectors ``(descriptions, text_embedding_dim)`` of a new description, by the adapter's own encoder."""
        if not self.embedding.has_text:
            raise ValueError(
                f"This adapter has no task with a description (task_embedding={shown(self.config.task_embedding)}), "
                f"so the description {shown(description)} means nothing to it. Pass examples= or embedding=, or train "
                "it with task_embedding='text' or 'both'."
            )
        texts = [description] if isinstance(description, str) else list(description)
        return encode_like(self.config, texts, self.embedding.text_vectors[0], text_encoder)

    @torch.no_grad()
    def embed(self, description: Description, text_encoder: Encoder) -> Tensor:
        """The task embedding ``(task_embedding_dim,)`` of a description."""
        check_description("(new)", description)
        vectors = self.vectors_of(description, text_encoder).to(self.embedding.text_vectors.device)
        return self.embedding.project(rms_norm(vectors, vectors.shape[-1:]).sum(0))

    def check_reads_examples(self, count: int, place: str) -> None:
        """Refuse new examples where the adapter knows none, or more than it was trained to read at once."""
        if not self.embedding.has_examples:
            raise ValueError(
                f"This adapter has no task with examples (task_embedding={shown(self.config.task_embedding)}), so "
                "it cannot read any. Fit a task to them with add_task(name, examples=...), or train it with "
                "task_embedding='examples' or 'text+examples'."
            )
        if count > MAX_EXAMPLES:
            raise ValueError(
                f"{place} has {count} rows, but the adapter was trained to read {MAX_EXAMPLES} at most. Give so many, "
                "or pass fit=True to add_task, which fits the task to all of them."
            )

    @torch.no_grad()
    def embed_examples(self, raw: Tensor, description: Description | None, text_encoder: Encoder) -> Tensor:
        """The task embedding ``(task_embedding_dim,)`` of the vectors of examples, with a description's if given."""
        self.embedding.check_filled()
        embedding = self.embedding.encode(raw)
        if description is None or not self.embedding.has_text:
            return embedding
        return embedding + self.embed(description, text_encoder)

    def check_example_tasks(self, names: Sequence[str]) -> None:
        """Refuse names that are no tasks with examples; all of those need some at first."""
        known = [
            name for name, kind in zip(self.config.tasks, self.config.task_sources, strict=True) if kind in EXAMPLES
        ]
        if not known:
            raise ValueError(
                f"set_examples is for tasks whose embedding comes from examples, and this adapter has none "
                f"(task_embedding={shown(self.config.task_embedding)}). Make it with task_embedding='examples'."
            )
        unknown = [name for name in names if name not in known]
        missing = [name for name in known if name not in names]
        if unknown:
            raise ValueError(
                f"set_examples got rows for {shown(unknown)}, but the tasks with examples are {shown(known)}. Leave "
                "the others out."
            )
        if not names:
            raise ValueError(f"set_examples got no rows at all. Give those of the tasks {shown(known)}.")
        if missing and not self.embedding.example_rows.is_filled:
            raise ValueError(
                f"set_examples got no rows for the tasks {shown(missing)}, which have none yet. Give all of them some."
            )

    def give_examples(self, raw: Mapping[str, Tensor]) -> None:
        """Take the vectors of tasks' examples ``(rows, size)``, by name, into the embedding that is there."""
        embedding = self.embedding
        encoder, rows = embedding.example_encoder, embedding.example_rows
        if not rows.is_filled:
            encoder.fit_scales(torch.cat(list(raw.values())))
        scaled = {name: encoder.scaled(vectors) for name, vectors in raw.items()}
        for name, vectors in scaled.items():
            if not vectors.any(1).all():
                raise ValueError(f"The examples of task {name!r} cannot be told from each other. Give different ones.")
        names = [
            name for name, kind in zip(self.config.tasks, self.config.task_sources, strict=True) if kind in EXAMPLES
        ]
        parts = dict(zip(names, rows.parts(), strict=True)) if rows.is_filled else {}
        parts |= {name: (rows.kept(vectors), vectors) for name, vectors in scaled.items()}
        kept, banks = zip(*(parts[name] for name in names), strict=True)
        rows.fill(torch.stack(kept), banks, is_given=True)

    def starts(self, description: Description | None, text_encoder: Encoder) -> Tensor:
        """Starting points ``(starts, task_embedding_dim)`` for a new task: known ones, their mean, the description."""
        ids = torch.arange(len(self.config.tasks))
        directions = self._directions(ids[:: -(-len(ids) // MAX_STARTS)])
        starts = [directions, directions.mean(0, keepdim=True)]
        if description is not None and self.embedding.has_text:
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
        return plain_size(embedding.detach())

    def _id(self, name: str) -> int:
        return int(resolve_task_ids(name, self.config.task_names))

    @torch.no_grad()
    def _directions(self, task_ids: Tensor) -> Tensor:
        embeddings = self.embedding(task_ids.to(self.embedding.like.device))
        return rms_norm(embeddings, embeddings.shape[-1:])

    def _rows(self) -> list[TaskRow]:
        config, embedding = self.config, self.embedding
        counts = [len(descriptions) for descriptions in config.embedded_descriptions if descriptions]
        learned = iter(() if embedding.weight is None else embedding.weight.detach())
        vectors = iter(torch.split(embedding.text_vectors, counts) if embedding.has_text else ())
        examples = iter(embedding.example_rows.parts() if embedding.has_examples else ())
        return [
            TaskRow(
                name,
                source,
                (config.task_descriptions or {}).get(name),
                next(learned) if source in LEARNED else None,
                next(vectors) if source in TEXT else None,
                next(examples) if source in EXAMPLES else None,
                config.labels_of(name) or None,
                self.own_factors.get(name),
            )
            for name, source in zip(config.tasks, config.task_sources, strict=True)
        ]

    # Tensors of inference mode could not be trained; and what is drawn for a start is replaced.
    @torch.inference_mode(False)
    @randomness_kept(())
    def _of(self, rows: Sequence[TaskRow], **changes: Any) -> TaskTable:
        """The table of these rows; what fails, fails before anything has changed."""
        old = self.embedding
        has_text, has_examples = (any(row.source in kind for row in rows) for kind in (TEXT, EXAMPLES))
        if not has_text:
            changes |= {"text_encoder": None, "text_encoder_revision": None, "text_embedding_dim": None}
        if not has_examples:
            changes |= {"example_dim": None, "example_classes": None}
        own_factors = {row.name: row.own_factors for row in rows if row.own_factors is not None}
        config = self.config.replaced(
            tasks=[row.name for row in rows],
            own_factors=list(own_factors) or None,
            task_descriptions={row.name: row.description for row in rows if row.description} or None,
            task_embedding={row.name: row.source for row in rows},
            task_labels={row.name: row.labels for row in rows if row.labels} or None,
            **changes,
        )
        counts = [0 if row.text_vectors is None else len(row.text_vectors) for row in rows]
        new = TaskEmbedding(
            config.task_sources,
            counts,
            config.task_embedding_dim,
            config.text_embedding_dim,
            old.example_encoder if has_examples else None,
        )
        new.train(old.training)
        learned = [row.learned for row in rows if row.learned is not None]
        if learned:
            like = old.like
            weight = torch.stack([vector.to(like) for vector in learned])
            new.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
        if has_text:
            new.text_projection = old.text_projection
            vectors = [row.text_vectors for row in rows if row.text_vectors is not None]
            new.text_vectors = torch.cat([one.to(old.text_vectors.device) for one in vectors])
            new.has_vectors = True
        examples = [row.examples for row in rows if row.examples is not None]
        if examples and old.example_rows.is_filled:
            kept, banks = zip(*examples, strict=True)
            new.example_rows.fill(torch.stack(kept), banks, old.example_rows.is_given)
        return TaskTable(config, new, own_factors)
