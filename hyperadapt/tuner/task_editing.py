"""Changing the tasks of a trained adapter: new ones from descriptions, examples or embeddings, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from hyperadapt.config.checks import check_number, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import check_description
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.routing.router import Router
from hyperadapt.tasks.embedding import TaskEmbedding, resolve_task_ids
from hyperadapt.tasks.encoders import encode_like

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hyperadapt.tasks.fitting import Examples

# Of the known tasks, how many are tried as starting points for a new one.
MAX_STARTS = 64


@dataclass(frozen=True)
class _Task:
    """One task of the table: its learned vector, the vectors of its descriptions, or both."""

    name: str
    source: str
    description: str | list[str] | None = None
    learned: Tensor | None = None
    text_vectors: Tensor | None = None


class TaskEditing(BaseTuner):
    """What the tuner model offers on tasks, for the active adapter. An optimizer has to be made anew after changes."""

    hyperadapter_networks: nn.ModuleDict
    router: Router

    def set_task(self, task: str | None) -> None:
        """Pin a task: calls that name no task use it, until changed.

        The factors of the eight tasks used last are kept while no parameter changes and gradients are off, so going
        back to one costs nothing. A write through ``parameter.data`` outside of training goes unnoticed; unpin with
        None after it, which drops what is kept.

        Args:
            task: Name of a task of every active adapter; None goes back to the default task.

        Raises:
            TypeError: If `task` is not a name.
            ValueError: If the task is unknown, or another one is merged.
        """
        if task is not None and not isinstance(task, str):
            raise TypeError(f"set_task got {task!r} ({type(task).__name__}); pass one task name, or None to unpin.")
        for name in self.active_adapters:
            config = self.router.network(name).config
            if task is not None:
                resolve_task_ids(task, config.task_names)
            if name in self.router.merged and self.router.merged[name] != (task or config.fallback_task):
                raise ValueError(
                    f"Task {self.router.merged[name]!r} of adapter {name!r} is merged into the base weights, so "
                    f"{task!r} cannot be pinned. Call unmerge_adapter() first."
                )
        for name in self.active_adapters:
            self.router.pin(name, task)

    def add_task(  # noqa: DOC503
        self,
        name: str,
        *,
        description: str | Sequence[str] | None = None,
        examples: Examples | None = None,
        embedding: Tensor | None = None,
        text_encoder: str | Callable[[list[str]], Tensor] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        training_arguments: TrainingArguments | None = None,
    ) -> None:
        """Add a task after training; nothing else changes.

        Args:
            name: Its name.
            description: A text that describes it, or several. Alone it is the task's condition, as in training, and
                there is no gradient step; with examples it is one of the starting points; with an embedding it is
                only kept.
            examples: Rows of model inputs with labels, 8 to 64 of them, a `datasets.Dataset` or a list of dicts: a
                new embedding is fitted to them (see ``fit_task_embedding``), all else is frozen.
            embedding: Its embedding, shape ``(task_embedding_dim,)``; only the direction counts.
            text_encoder: The encoder that the adapter was made with, where its name does not find it (a function, or
                a folder that has moved).
            data_collator: Makes batches of examples, as in ``Trainer``; None stacks them.
            training_arguments: How to fit, as in ``Trainer``; None for a short run that suits few examples.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the name is taken or empty, nothing or too much is given, the adapter knows no text, the
                encoder is another one, or the embedding has the wrong shape or is not finite.
        """
        adapter_name, network = self._edited()
        tasks = _tasks(network)
        _check_new_name(name, network.config)
        if description is None and examples is None and embedding is None:
            raise ValueError(f"add_task({name!r}) got nothing to go by. Pass description=, examples= or embedding=.")
        if examples is not None and embedding is not None:
            raise ValueError(f"add_task({name!r}) got both examples and an embedding. Pass one of the two.")
        if description is not None:
            check_description(name, description)
            description = description if isinstance(description, str) else list(description)
        if embedding is not None:
            learned = _checked_embedding(embedding, network.config.task_embedding_dim)
            task = _Task(name, "learned", description, learned)
        elif examples is not None:
            # Trainer and datasets take longer to import than all of this package.
            from hyperadapt.tasks.fitting import fit_task_embedding

            starts = self._starts(network, description, text_encoder)
            learned = fit_task_embedding(
                self,
                self._call_with_embedding,
                starts,
                examples,
                data_collator=data_collator,
                training_arguments=training_arguments,
            )
            task = _Task(name, "learned", description, learned)
        else:
            assert description is not None
            vectors = _encode(network, description, text_encoder)
            task = _Task(name, "text", description, text_vectors=vectors)
        self._write(adapter_name, [*tasks, task])

    def remove_task(self, name: str) -> None:
        """Remove a task; the ids of those after it become smaller by one.

        Args:
            name: Its name.

        Raises:
            ValueError: If it is unknown, the only one, the default task, pinned or merged.
        """
        adapter_name, network = self._edited()
        task_id = int(resolve_task_ids(name, network.config.task_names))
        reasons = {
            "the only task": len(network.config.tasks) == 1,
            "the default task; set default_task of the configuration to another one": network.config.default_task
            == name,
            "pinned; call set_task(None)": self.router.pinned.get(adapter_name) == name,
            "merged into the base weights; call unmerge_adapter()": self.router.merged.get(adapter_name) == name,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"Task {name!r} cannot be removed: it is {reason}.")
        tasks = _tasks(network)
        self._write(adapter_name, tasks[:task_id] + tasks[task_id + 1 :])

    def rename_task(self, name: str, new_name: str) -> None:  # noqa: DOC502
        """Rename a task; its id stays.

        Args:
            name: Its name.
            new_name: Its new name.

        Raises:
            TypeError: If the new name is no string.
            ValueError: If it is unknown, or the new name is empty or taken.
        """
        adapter_name, network = self._edited()
        task_id = int(resolve_task_ids(name, network.config.task_names))
        _check_new_name(new_name, network.config)
        tasks = _tasks(network)
        tasks[task_id] = replace(tasks[task_id], name=new_name)
        default = new_name if network.config.default_task == name else network.config.default_task
        self._write(adapter_name, tasks, default_task=default)
        for kept in (self.router.pinned, self.router.merged):
            if kept.get(adapter_name) == name:
                kept[adapter_name] = new_name

    def interpolate_tasks(self, name: str, weights: Mapping[str, float]) -> None:  # noqa: DOC503
        """Add a task between others: its embedding is the weighted sum of their embeddings' directions.

        Args:
            name: Name of the new task.
            weights: Known task -> weight (dimensionless); only their ratios count.

        Raises:
            TypeError: If a weight is no number.
            ValueError: If the name is taken, there are no weights, a task is unknown, or the sum is zero.
        """
        adapter_name, network = self._edited()
        _check_new_name(name, network.config)
        if not weights:
            raise ValueError(f"interpolate_tasks({name!r}) got no weights. Pass a dict from known task to weight.")
        for task, weight in weights.items():
            check_number(f"weights[{shown(task)}]", weight, "a finite number", lambda value: True)
        directions = _directions(network, resolve_task_ids(list(weights), network.config.task_names))
        factors = torch.tensor(list(weights.values()), dtype=directions.dtype, device=directions.device)
        embedding = factors @ directions
        # Entries of directions are of order 1; a few roundings of each term are left of those that cancel.
        if float(embedding.abs().max()) <= 8 * torch.finfo(embedding.dtype).eps * float(factors.abs().sum()):
            raise ValueError(f"weights={shown(dict(weights))} cancel, so that no direction is left. Change them.")
        self._write(adapter_name, [*_tasks(network), _Task(name, "learned", None, embedding)])

    def embed_description(  # noqa: DOC502
        self, description: str | Sequence[str], *, text_encoder: str | Callable[[list[str]], Tensor] | None = None
    ) -> Tensor:
        """The task embedding of a description, without a task of that kind: for ``task_embeddings=``.

        Args:
            description: A text, or several that each describe the task.
            text_encoder: As in ``add_task``.

        Returns:
            Shape ``(task_embedding_dim,)``, detached.

        Raises:
            ValueError: If the adapter knows no text, the text is empty, or the encoder is another one.
        """
        _, network = self._edited()
        check_description("(new)", description)
        vectors = _encode(network, description, text_encoder)
        with torch.no_grad():
            table = network.task_embedding
            vectors = vectors.to(table.text_vectors.device)
            return table.project(rms_norm(vectors, vectors.shape[-1:]).sum(0))

    def _edited(self) -> tuple[str, HyperAdapterNetwork]:
        """The active adapter and its network, if its parameters are whole."""
        if len(self.active_adapters) != 1:
            raise ValueError(
                f"Tasks belong to one adapter, but {self.active_adapters} are active. Set one with set_adapter."
            )
        [adapter_name] = self.active_adapters
        network = self.router.network(adapter_name)
        if whole_network(network) is not network:
            raise ValueError(
                "The adapter is sharded over processes, so its tasks cannot be changed. Save it, and change them in "
                "one process."
            )
        return adapter_name, network

    def _starts(
        self,
        network: HyperAdapterNetwork,
        description: str | Sequence[str] | None,
        text_encoder: str | Callable[[list[str]], Tensor] | None,
    ) -> Tensor:
        """Starting points for a new task: known tasks, their mean, and the description."""
        ids = torch.arange(len(network.config.tasks))
        directions = _directions(network, ids[:: -(-len(ids) // MAX_STARTS)])
        starts = [directions, directions.mean(0, keepdim=True)]
        if description is not None and not network.task_embedding.is_all_learned:
            starts.append(self.embed_description(description, text_encoder=text_encoder)[None])
        return torch.cat(starts)

    def _call_with_embedding(self, embedding: Tensor, batch: Mapping[str, Any]) -> Any:
        with self._enable_peft_forward_hooks(task_embeddings=embedding, **batch):
            return self.model(**batch)

    def _write(self, adapter_name: str, tasks: Sequence[_Task], **changes: Any) -> None:
        """Replace the table of tasks; what fails, fails before anything has changed."""
        network = self.router.network(adapter_name)
        old = network.task_embedding
        has_text = any(task.source != "learned" for task in tasks)
        if not has_text:
            changes |= {"text_encoder": None, "text_encoder_revision": None, "text_embedding_dim": None}
        config = network.config.replaced(
            tasks=[task.name for task in tasks],
            task_descriptions={task.name: task.description for task in tasks if task.description} or None,
            task_embedding={task.name: task.source for task in tasks},
            **changes,
        )
        counts = [0 if task.text_vectors is None else len(task.text_vectors) for task in tasks]
        table = TaskEmbedding(config.task_sources, counts, config.task_embedding_dim, config.text_embedding_dim)
        table.train(old.training)
        reference = next(network.parameters())
        learned = [task.learned for task in tasks if task.learned is not None]
        if learned:
            rows = torch.stack([vector.to(reference) for vector in learned])
            like = old.text_projection.weight if old.weight is None else old.weight
            table.weight = nn.Parameter(rows, requires_grad=like.requires_grad)
        if has_text:
            table.text_projection = old.text_projection
            vectors = [task.text_vectors for task in tasks if task.text_vectors is not None]
            table.text_vectors = torch.cat([one.to(old.text_vectors.device) for one in vectors])
            table.has_vectors = True
        network.task_embedding, network.config = table, config
        self.peft_config[adapter_name] = config
        # A new tensor may lie where the old one did, so that nothing tells stale factors.
        self.router.drop_factors(adapter_name)


def _tasks(network: HyperAdapterNetwork) -> list[_Task]:
    config, table = network.config, network.task_embedding
    counts = [len(descriptions) for descriptions in config.embedded_descriptions]
    learned = iter(() if table.weight is None else table.weight.detach())
    vectors = iter(
        () if table.is_all_learned else torch.split(table.text_vectors, [count for count in counts if count])
    )
    return [
        _Task(
            name,
            source,
            (config.task_descriptions or {}).get(name),
            None if source == "text" else next(learned),
            None if source == "learned" else next(vectors),
        )
        for name, source in zip(config.tasks, config.task_sources, strict=True)
    ]


@torch.no_grad()
def _directions(network: HyperAdapterNetwork, task_ids: Tensor) -> Tensor:
    embeddings = network.task_embedding(task_ids.to(network.base_norms.device))
    return rms_norm(embeddings, embeddings.shape[-1:])


def _encode(
    network: HyperAdapterNetwork,
    description: str | Sequence[str],
    text_encoder: str | Callable[[list[str]], Tensor] | None,
) -> Tensor:
    if network.task_embedding.is_all_learned:
        raise ValueError(
            f"This adapter was trained without descriptions (task_embedding='learned'), so the description "
            f"{shown(description)} means nothing to it. Pass examples= or embedding=, or train it with "
            "task_embedding='text' or 'both'."
        )
    texts = [description] if isinstance(description, str) else list(description)
    return encode_like(network.config, texts, network.task_embedding.text_vectors[0], text_encoder)


def _check_new_name(name: object, config: HyperAdapterConfig) -> None:
    if not isinstance(name, str):
        raise TypeError(f"The name of a task must be a string, not {shown(name)} ({type(name).__name__}).")
    if not name.strip():
        raise ValueError(f"The name of a task is {shown(name)}; write a non-empty name.")
    if name in config.tasks:
        raise ValueError(f"There already is a task {name!r}. Choose another name, or remove_task({name!r}) first.")


def _checked_embedding(embedding: object, task_embedding_dim: int) -> Tensor:
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        kind = f"a tensor of dtype {embedding.dtype}" if isinstance(embedding, Tensor) else type(embedding).__name__
        raise TypeError(f"embedding is {kind}, but must be a floating-point tensor of shape ({task_embedding_dim},).")
    if embedding.shape != (task_embedding_dim,):
        raise ValueError(
            f"embedding has shape {tuple(embedding.shape)}, but must have shape ({task_embedding_dim},), "
            "task_embedding_dim of the configuration."
        )
    if not embedding.isfinite().all() or not embedding.any():
        raise ValueError("embedding is zero or not finite; only a direction can be an embedding.")
    return embedding.detach()
