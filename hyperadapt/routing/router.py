"""Which task each row of a batch uses, and the factors generated for the current forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.forward_pass import Routed, Scope, ScopeOwner, current_scope, installed
from hyperadapt.tasks.embedding import can_read, resolve_task_ids

# Of pinned tasks, so that going back to one is a look-up; each takes the memory of a LoRA.
KEPT_TASKS = 8
Tasks = str | Sequence[str] | Tensor
_GIVE_TASKS = (
    "Pass tasks= with the batch. Trainer drops such a column unless it is given remove_unused_columns=False, and other "
    "data collators drop it too: see HyperAdapterTrainer and TaskCollator. Or pin a task with set_task."
)


@dataclass(frozen=True)
class Request:
    """What a caller asked for: tasks, or task embeddings.

    Args:
        tasks: One name for all rows, one name per row, or integer ids ``(batch,)``.
        task_embeddings: Shape ``(batch, task_embedding_dim)``, or ``(task_embedding_dim,)`` for all rows: for
            conditions that have no id.

    Raises:
        ValueError: If both are given.
    """

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


class Router(ScopeOwner):
    """Keeps requests and factors where every adapted layer can find them.

    A plain object on purpose: layers share it without registering the networks a second time.

    Args:
        networks: The networks by adapter name, as registered on the tuner model.
    """

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.networks = networks
        self.pinned: dict[str, str] = {}
        self.merged: dict[str, str] = {}
        self.requests: list[Request] = []
        self._cache: dict[str, tuple[object, dict[str, dict[str, Factors]]]] = {}
        self._warned = False

    def network(self, adapter_name: str) -> HyperAdapterNetwork:
        """The network of an adapter.

        Args:
            adapter_name: The adapter.

        Returns:
            Its network.
        """
        network = self.networks[adapter_name]
        assert isinstance(network, HyperAdapterNetwork)
        return network

    @contextmanager
    def open(self, request: Request, adapter_names: Iterable[str], model_input: Tensor | None) -> Iterator[None]:  # noqa: DOC502
        """Generate the factors of a forward pass and keep them for its duration.

        Args:
            request: What the call asked for; if empty, the innermost ``use_tasks``, the pinned task or
                the default task decides.
            adapter_names: The active adapters.
            model_input: Main input of the base model, shape ``(batch, ...)``; None if it is not known yet.

        Yields:
            None.

        Raises:
            ValueError: If the number of tasks is not the number of rows, or other tasks than the merged
                one are asked for.
        """
        if request.is_empty and self.requests:
            request = self.requests[-1]
        routed = {}
        for name in adapter_names:
            if name in self.merged:
                self._check_merged(name, request)
            else:
                routed[name] = self._route(name, request)
        scope = Scope(routed, request.num_rows)
        if model_input is not None:
            scope.observe(model_input)
        with installed(self, scope):
            yield

    def lookup(  # noqa: DOC502
        self, adapter_name: str, position: Position, x: Tensor
    ) -> tuple[Factors, Tensor | None]:
        """The factors that a layer applies now.

        Args:
            adapter_name: The adapter.
            position: The layer's position.
            x: The layer's input.

        Returns:
            The current forward pass's factors, and the task of each element of the first dimension of `x` (None: one
            task for all, or one for each, in order). Outside of a forward pass (a submodule is called on its own) the
            factors are generated for this position alone and the task in force.

        Raises:
            RuntimeError: If the call recomputes a forward pass whose factors are out of reach.
        """
        scope = current_scope(self) or Scope({})
        routed = scope.routed.get(adapter_name) or self._route_alone(adapter_name, position)
        rows = None if routed.rows is None else scope.rows_of(routed.rows, x, position)
        # Where each row has a task of its own, no factors need to be picked.
        return routed.factors[position.name], None if rows is routed.rows and routed.is_one_to_one else rows

    def _route_alone(self, adapter_name: str, position: Position) -> Routed:
        # Private, but how torch.utils.checkpoint itself tells that it recomputes.
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"Module {position.name!r} is recomputed during backward by a checkpoint that hyperadapt does not "
                "know, so the tasks of its forward pass are lost. Use the model's own gradient checkpointing "
                "(model.activation_checkpointing_enable(), or its switch in TrainingArguments), and call the PeftModel "
                "itself."
            )
        request = self.requests[-1] if self.requests else Request()
        return self._route(adapter_name, request, [position])

    def task_in_force(self, adapter_name: str) -> str:
        """Name of the task of calls that ask for none: the pinned one, else the default with one warning.

        Args:
            adapter_name: The adapter.

        Returns:
            The task's name.
        """
        if adapter_name in self.pinned:
            return self.pinned[adapter_name]
        config = self.network(adapter_name).config
        if len(config.task_names) > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"No task was given, so all rows use the default task {config.fallback_task!r} of "
                f"{len(config.task_names)}. {_GIVE_TASKS}",
                stacklevel=2,
            )
        return config.fallback_task

    def factors_of_task(
        self,
        adapter_name: str,
        task: str,
        positions: Sequence[Position] | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Factors]:
        """Generate the factors of one task.

        Args:
            adapter_name: The adapter.
            task: Name of the task.
            positions: The positions to generate; None for all.
            dtype: Of A and B; None for the network's own.

        Returns:
            The factors by position name, for one task.
        """
        network = self.network(adapter_name)
        task_ids = resolve_task_ids([task], network.config.task_names)
        factors: dict[str, Factors] = network(task_ids, positions, dtype)
        return factors

    def pin(self, adapter_name: str, task: str | None) -> None:
        """Pin a task. Unpinning, or pinning a task again, drops all factors that were kept.

        Args:
            adapter_name: The adapter.
            task: The task; None to unpin.
        """
        if task in (None, self.pinned.get(adapter_name)):
            self.drop_factors(adapter_name)
        if task is None:
            self.pinned.pop(adapter_name, None)
        else:
            self.pinned[adapter_name] = task

    def drop_factors(self, adapter_name: str) -> None:
        """Let factors of pinned tasks be generated anew when they are next needed.

        Args:
            adapter_name: The adapter.
        """
        self._cache.pop(adapter_name, None)

    def forget(self, adapter_name: str) -> None:
        """Drop what is kept about an adapter.

        Args:
            adapter_name: The adapter.
        """
        for kept in (self.pinned, self.merged, self._cache):
            kept.pop(adapter_name, None)

    def _route(self, adapter_name: str, request: Request, positions: Sequence[Position] | None = None) -> Routed:
        network = self.network(adapter_name)
        # A graph could not tell that kept factors have become stale, so it generates them.
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            # Training may write to `parameter.data`, which counts no versions.
            self.drop_factors(adapter_name)
        elif request.is_empty and adapter_name in self.pinned and positions is None and not compiling:
            return Routed(self._pinned_factors(adapter_name), None)
        tasks = request.tasks
        if request.task_embeddings is not None:
            embeddings = _check_embeddings(request.task_embeddings, network.config.task_embedding_dim)
            rows = torch.arange(len(embeddings), device=embeddings.device) if len(embeddings) > 1 else None
            return Routed(network(embeddings, positions, _autocast_dtype(network)), rows, is_one_to_one=True)
        if tasks is None:
            self._check_training(adapter_name)
            tasks = self.task_in_force(adapter_name)
        task_ids = resolve_task_ids(tasks, network.config.task_names)
        distinct, rows, is_one_to_one = _distinct(task_ids, len(network.config.task_names))
        # All layers on this device then take them as they are.
        rows = rows.to(network.hypernetwork.layer_embedding.device, non_blocking=True)
        # Where rows share a task, its gradient is a sum over them, which half precision would round.
        is_sum = not is_one_to_one and len(distinct) > 1
        factors = network(distinct, positions, None if is_sum else _autocast_dtype(network))
        return Routed(factors, rows if len(distinct) > 1 else None, is_one_to_one)

    def _check_training(self, adapter_name: str) -> None:
        """Refuse to train one of several tasks on all rows because their tasks were lost on the way."""
        network = self.network(adapter_name)
        config = network.config
        is_clear = len(config.task_names) == 1 or config.default_task is not None or adapter_name in self.pinned
        if network.training and torch.is_grad_enabled() and not is_clear:
            raise ValueError(
                f"Adapter {adapter_name!r} trains {len(config.task_names)} tasks, but this batch does not say which: "
                f"all its rows would train {config.fallback_task!r}. {_GIVE_TASKS}"
            )

    def _pinned_factors(self, adapter_name: str) -> dict[str, Factors]:
        network = self.network(adapter_name)
        task, dtype = self.pinned[adapter_name], _autocast_dtype(network)
        versions = dtype, *_versions(network)
        known_versions, known = self._cache.get(adapter_name, (versions, {}))
        # A copy, since other threads may read; the task used last comes last.
        kept = dict(known) if known_versions == versions else {}
        factors = kept.pop(task, None) or self.factors_of_task(adapter_name, task, dtype=dtype)
        kept[task] = factors
        if len(kept) > KEPT_TASKS:
            del kept[next(iter(kept))]
        self._cache[adapter_name] = versions, kept
        return factors

    def _check_merged(self, adapter_name: str, request: Request) -> None:
        merged, names = self.merged[adapter_name], self.network(adapter_name).config.task_names
        if request.is_empty:
            return
        if request.tasks is None or set(resolve_task_ids(request.tasks, names).reshape(-1).tolist()) != {
            names.index(merged)
        }:
            raise ValueError(
                f"Task {merged!r} of adapter {adapter_name!r} is merged into the base weights, so no other task can be "
                "used. Call unmerge_adapter() first."
            )


def _distinct(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, bool]:
    """The tasks to generate for, which of them each row uses, and whether those are just its own, in order."""
    is_known = can_read(task_ids)
    if is_known:
        distinct, rows = torch.unique(task_ids, return_inverse=True)
        if len(distinct) < task_ids.numel():
            return distinct, rows, False
    # Otherwise the number of tasks cannot depend on the values: as many as there may be distinct ones.
    if is_known or task_ids.ndim == 0 or len(task_ids) < num_tasks:
        return task_ids.reshape(-1), torch.arange(task_ids.numel(), device=task_ids.device), True
    return torch.arange(num_tasks, device=task_ids.device), task_ids, False


def _autocast_dtype(network: HyperAdapterNetwork) -> torch.dtype | None:
    """What layers would cast each A and B to, in fewer calls for all positions at once; None outside autocast."""
    kind = network.hypernetwork.layer_embedding.device.type
    is_enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_enabled else None


def main_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a base model is called with, from which the number of rows is told.

    Args:
        model: The base model.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The first input that is a tensor with rows; None if there is none.
    """
    names = (getattr(model, "main_input_name", "input_ids"), "inputs", "input_ids", "inputs_embeds")
    candidates = (*args[:1], *(kwargs.get(name) for name in names))
    return next((value for value in candidates if isinstance(value, Tensor) and value.ndim), None)


_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write to parameters without counting versions.
register_optimizer_step_post_hook(_count_optimizer_step)


def _versions(network: nn.Module) -> tuple[object, ...]:
    """What changes whenever a tensor of the network is replaced, moved, cast or written to."""
    tensors = [*network.parameters(), *network.buffers()]
    # Tensors made in inference mode count no versions; nothing may be kept for them.
    versions = (object() if t.is_inference() else (t.data_ptr(), t._version, t.dtype) for t in tensors)
    return _optimizer_steps, *versions


def _check_embeddings(task_embeddings: Tensor, task_embedding_dim: int) -> Tensor:
    """Embeddings in two dimensions."""
    if not task_embeddings.is_floating_point():
        raise TypeError(
            f"task_embeddings has dtype {task_embeddings.dtype}, but embeddings are floating point. Task ids go into "
            "tasks=."
        )
    if task_embeddings.shape == (task_embedding_dim,):
        return task_embeddings[None]
    if task_embeddings.ndim != 2 or not len(task_embeddings) or task_embeddings.shape[1] != task_embedding_dim:
        raise ValueError(
            f"task_embeddings has shape {tuple(task_embeddings.shape)}, but must have shape "
            f"(batch, {task_embedding_dim}), or ({task_embedding_dim},) for all rows."
        )
    return task_embeddings
