"""Which task each row of a batch uses, and the factors generated for the current forward pass."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.forward_pass import ForwardPass, Routed
from hyperadapt.routing.kept_factors import KeptFactors, state_of
from hyperadapt.routing.layouts import Call, Layouts
from hyperadapt.routing.learning import learn, print_of
from hyperadapt.routing.requests import Request, distinct_tasks
from hyperadapt.routing.scopes import Scope, innermost, is_open_elsewhere, opened
from hyperadapt.tasks.ids import resolve_task_ids

_GIVE_TASKS = (
    "Pass tasks= with the batch. Trainer drops such a column unless it is given remove_unused_columns=False, and other "
    "data collators drop it too: see HyperAdapterTrainer and TaskCollator. Or pin a task with set_task."
)


class _Current(threading.local):
    """The innermost forward pass of each thread.

    A context variable would do the same, since no forward pass awaits anything, but a graph cannot read one: from here,
    generated factors become inputs of a graph of any part of the model.
    """

    def __init__(self) -> None:
        # Called by each thread, and not a default of the class: a graph could not tell the two apart.
        self.forward_pass: ForwardPass | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied router has no forward pass.
        return type(self), ()


class Router:
    """Keeps requests and factors where every adapted layer can find them.

    A plain object on purpose: layers share it without registering the networks a second time. The networks are by
    adapter name, as registered on the tuner model.
    """

    def __init__(self, networks: nn.ModuleDict) -> None:
        self.networks = networks
        self.pinned: dict[str, str] = {}
        # Also for adapters that were not pinned themselves, such as the copy of a policy that TRL takes as reference.
        self.last_pin: str | None = None
        self.merged: dict[str, str] = {}
        self._merged_layers: Counter[str] = Counter()
        self.layouts = Layouts()
        # The hooks that see the calls of the base model and of its parts; graphs cannot read them.
        self.observers: list[RemovableHandle] = []
        self.is_observing = True
        # Between several models that were made from one base model.
        self.is_shared = False
        self._kept = KeptFactors()
        self._current = _Current()
        self._warned: set[str] = set()

    def network(self, adapter_name: str) -> HyperAdapterNetwork:
        """The network of an adapter."""
        network = self.networks[adapter_name]
        assert isinstance(network, HyperAdapterNetwork)
        return network

    def only(self, adapter_names: Sequence[str]) -> tuple[str, HyperAdapterNetwork]:
        """Name and network of the one active adapter, for what works on one."""
        if len(adapter_names) != 1:
            raise ValueError(f"One adapter must be active, but {list(adapter_names)} are. Set one with set_adapter.")
        return adapter_names[0], self.network(adapter_names[0])

    @contextmanager
    def open(
        self,
        request: Request,
        adapter_names: Iterable[str],
        model_input: Tensor | None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[None]:
        """Generate the factors of a forward pass of the active adapters and keep them for its duration.

        Without tasks the innermost ``use_tasks`` counts, the pinned task or the default task. The main input of the
        base model, shape ``(batch, ...)``, is None if it is not known yet; options are the arguments of generate.
        """
        if request.is_empty and self.asked is not None:
            self.asked.check_rows_keep_their_order()
            told = request.task_rows
            request = replace(self.asked.request, task_rows=told) if told else self.asked.request
        routed = {}
        for name in adapter_names:
            if name in self.merged:
                self.check_merged(name, request)
            else:
                routed[name] = self._route(name, request)
        forward_pass = ForwardPass(routed, request, options)
        if model_input is not None:
            forward_pass.count(model_input.shape[0])
        with self.installed(forward_pass):
            yield

    def asking(self, request: Request) -> AbstractContextManager[None]:
        """Let the calls of this thread, or asyncio task, that ask for nothing mean a request."""
        return opened(id(self), request)

    @property
    def asked(self) -> Scope | None:
        """What the innermost ``use_tasks`` asks for, and the call inside of it."""
        return innermost(id(self))

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Let adapted layers leave prints of what they get and do nothing, while layouts are learned."""
        prints: dict[str, list[Tensor]] = {}
        with self.installed(ForwardPass({}, prints=prints)):
            yield prints

    def records(self, position: str, x: Tensor) -> bool:
        """Whether a layer is only to leave a print of its input, which it has done then."""
        current = self.current
        if current is None or current.prints is None:
            return False
        current.prints.setdefault(position, []).append(print_of(x))
        return True

    def observe(self, module: nn.Module, call: Call) -> None:
        """Note a call of the base model or of a part of it, and learn how rows lie in it if that is needed."""
        forward_pass = self.current or self.asked
        if forward_pass is None or forward_pass.prints is not None:
            return
        if forward_pass.call is not None and forward_pass.call.contains(call.path):
            return
        forward_pass.observe(call)
        if isinstance(forward_pass, Scope):
            forward_pass.check_rows_keep_their_order()
        if forward_pass.is_mixed and not call.problem:
            layouts = self.layouts.find(call)
            if layouts is None and torch.compiler.is_dynamo_compiling():
                raise RuntimeError(
                    "Where rows lie in this model is not known yet, and a graph cannot learn it. Call the model once "
                    "with a task per row before it is compiled or exported."
                )
            if layouts is None:
                layouts = learn(self.layouts, module, call, self.recording, self._fused_experts())
            call.layouts = layouts

    @contextmanager
    def installed(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Make a forward pass the current one of this thread."""
        outer, self._current.forward_pass = self._current.forward_pass, forward_pass
        try:
            yield
        finally:
            self._current.forward_pass = outer

    @property
    def current(self) -> ForwardPass | None:
        """The innermost forward pass of this thread."""
        return self._current.forward_pass

    def _fused_experts(self) -> set[str]:
        """Names of positions whose module gets all tokens, and deals them out to its experts itself."""
        networks = map(self.network, self.networks)
        return {position.name for network in networks for position in network.positions if position.experts}

    def stop_observing(self) -> None:
        """Take the hooks off the base model."""
        for observer in self.observers:
            observer.remove()
        self.is_observing = False

    def lookup(self, adapter_name: str, position: Position, x: Tensor) -> tuple[Factors, Tensor | None]:
        """The factors that a layer applies to its input now, and the task of each element of the first dimension.

        None as tasks: one for all, or one for each, in order. Outside of a forward pass (a submodule is called on its
        own) the factors are generated for this position alone and the task in force.
        """
        forward_pass = self.current or self.asked or ForwardPass({})
        routed = forward_pass.routed.get(adapter_name) or self._route_alone(adapter_name, position)
        rows = None if routed.rows is None else forward_pass.rows_of(routed.rows, x, position)
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
        called = self.current
        if self.is_shared and called is not None and adapter_name not in (*called.routed, *self.merged):
            raise self.other_model(adapter_name, (*called.routed, *self.merged))
        request = Request() if self.asked is None else self.asked.request
        return self._route(adapter_name, request, [position])

    def other_model(self, adapter_name: str, wanted: Iterable[str]) -> RuntimeError:
        """What to raise where an adapter is active, but the model that is used wants others."""
        return RuntimeError(
            f"Adapter {adapter_name!r} is active in the layers, but this model uses {', '.join(map(repr, wanted))}. Of "
            "several models made from one base model, only the one activated last can be used: call its set_adapter "
            "first."
        )

    def task_in_force(self, adapter_name: str) -> str:
        """Name of the task of calls that ask for none: what they were told, else the default with one warning."""
        told = self.told_task(adapter_name)
        if told is not None:
            return told
        config = self.network(adapter_name).config
        if len(config.task_names) > 1 and is_open_elsewhere(id(self)):
            raise ValueError(
                "No task was given, while another thread is inside of use_tasks, which does not reach this one. Open "
                "use_tasks in this thread, start it with contextvars.copy_context().run, pass tasks=, or pin a task "
                "with set_task."
            )
        if self.last_pin is not None and len(config.task_names) > 1 and config.default_task is None:
            raise ValueError(
                f"Task {self.last_pin!r} is pinned, but adapter {adapter_name!r} does not know it: its tasks are "
                f"{', '.join(config.task_names)}. Pin one of them with set_task, or name the tasks of the call."
            )
        if len(config.task_names) > 1 and adapter_name not in self._warned:
            self._warned.add(adapter_name)
            warnings.warn(
                f"No task was given, so all rows use the default task {config.fallback_task!r} of "
                f"{len(config.task_names)}. {_GIVE_TASKS}",
                stacklevel=2,
            )
        return config.fallback_task

    def told_task(self, adapter_name: str) -> str | None:
        """The task of calls that ask for none, if they were told: the merged one, ``use_tasks``'s or the pinned one."""
        if adapter_name in self.merged:
            return self.merged[adapter_name]
        if self.asked is not None:
            return self.asked.request.only_task(self.network(adapter_name).config.task_names)
        return self.pinned_task(adapter_name)

    def factors_of_task(
        self,
        adapter_name: str,
        task: str,
        positions: Sequence[Position] | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Factors]:
        """Factors of one task by position name; of all positions and in the network's dtype, unless told otherwise."""
        network = self.network(adapter_name)
        task_ids = resolve_task_ids([task], network.config.task_names)
        factors: dict[str, Factors] = network(task_ids, positions, dtype)
        return factors

    def pinned_task(self, adapter_name: str) -> str | None:
        """The task pinned for an adapter: its own, else the one pinned last for others, if it knows that one."""
        if adapter_name in self.pinned:
            return self.pinned[adapter_name]
        return self.last_pin if self.last_pin in self.network(adapter_name).config.task_names else None

    def described(self, adapter_name: str) -> str:
        """An adapter's number of tasks, and which one is pinned."""
        count, pinned = len(self.network(adapter_name).config.task_names), self.pinned_task(adapter_name)
        return f"{adapter_name}: {count} task{'s' * (count > 1)}{f', {pinned!r} pinned' * bool(pinned)}"

    def pin(self, adapter_name: str, task: str | None) -> None:
        """Pin a task, or unpin with None. Unpinning, or pinning a task again, drops all factors that were kept."""
        self.last_pin = task
        if task in (None, self.pinned.get(adapter_name)):
            self.drop_factors(adapter_name)
        if task is None:
            self.pinned.pop(adapter_name, None)
        else:
            self.pinned[adapter_name] = task

    def rename(self, adapter_name: str, task: str, new_name: str) -> None:
        """Keep a task of an adapter pinned and merged under its new name."""
        if self.pinned_task(adapter_name) == task:
            self.pinned[adapter_name] = new_name
        others = [name for name in self.networks if name != adapter_name and self.pinned_task(name) == task]
        if self.last_pin == task and not others:
            self.last_pin = new_name
        if self.merged.get(adapter_name) == task:
            self.merged[adapter_name] = new_name

    def drop_factors(self, adapter_name: str) -> None:
        """Let factors of pinned tasks be generated anew when they are next needed."""
        self._kept.drop(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Drop what is kept about an adapter."""
        pinned = self.pinned.pop(adapter_name, None)
        if pinned == self.last_pin and pinned not in self.pinned.values():
            self.last_pin = None
        self.merged.pop(adapter_name, None)
        del self._merged_layers[adapter_name]
        self.drop_factors(adapter_name)

    def note_merged(self, adapter_name: str, task: str) -> None:
        """One layer has a task merged into its base weight."""
        self.merged[adapter_name] = task
        self._merged_layers[adapter_name] += 1

    def note_unmerged(self, adapter_name: str) -> None:
        """One layer has it no more; other tasks can be used once none has."""
        self._merged_layers[adapter_name] -= 1
        if not self._merged_layers[adapter_name]:
            del self.merged[adapter_name]

    def _route(self, adapter_name: str, request: Request, positions: Sequence[Position] | None = None) -> Routed:
        network = self.network(adapter_name)
        # A graph could not tell that kept factors have become stale, so it generates them.
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            # Training may write to `parameter.data`, which counts no versions.
            self.drop_factors(adapter_name)
        elif request.is_empty and positions is None and not compiling:
            pinned = self.pinned_task(adapter_name)
            if pinned is not None:
                return Routed(self._pinned_factors(adapter_name, pinned), None)
        embeddings = request.embeddings(network.config.task_embedding_dim)
        if embeddings is not None:
            rows = torch.arange(embeddings.shape[0], device=embeddings.device) if embeddings.shape[0] > 1 else None
            return Routed(network(embeddings, positions, _autocast_dtype(network)), rows, rows is not None)
        tasks = request.tasks
        if tasks is None:
            self._check_training(adapter_name)
            tasks = self.task_in_force(adapter_name)
        task_ids = resolve_task_ids(tasks, network.config.task_names)
        distinct, rows, is_one_to_one = distinct_tasks(task_ids, len(network.config.task_names))
        # All layers on this device then take them as they are.
        rows = rows.to(network.hypernetwork.layer_embedding.device, non_blocking=True)
        # Where rows share a task, its gradient is a sum over them, which half precision would round.
        is_sum = not is_one_to_one and distinct.shape[0] > 1
        factors = network(distinct, positions, None if is_sum else _autocast_dtype(network))
        # One task is the same to the layers however it was named, so that graphs of them serve all ways.
        return Routed(factors, rows, is_one_to_one) if distinct.shape[0] > 1 else Routed(factors, None)

    def _check_training(self, adapter_name: str) -> None:
        """Refuse to train one of several tasks on all rows because their tasks were lost on the way."""
        network = self.network(adapter_name)
        config = network.config
        is_clear = len(config.task_names) == 1 or config.default_task is not None
        if network.training and torch.is_grad_enabled() and not is_clear and self.pinned_task(adapter_name) is None:
            raise ValueError(
                f"Adapter {adapter_name!r} trains {len(config.task_names)} tasks, but this batch does not say which: "
                f"all its rows would train {config.fallback_task!r}. {_GIVE_TASKS}"
            )

    def _pinned_factors(self, adapter_name: str, task: str) -> dict[str, Factors]:
        network = self.network(adapter_name)
        dtype = _autocast_dtype(network)
        state = state_of(network, dtype)
        factors = self._kept.find(adapter_name, task, state) or self.factors_of_task(adapter_name, task, dtype=dtype)
        self._kept.keep(adapter_name, task, state, factors)
        return factors

    def check_merged_part(self, adapter_names: Iterable[str]) -> None:
        """Refuse a call of a part by itself inside of a ``use_tasks`` for other tasks than the merged ones."""
        if self.current is None and self.asked is not None:
            for name in adapter_names:
                self.check_merged(name, self.asked.request)

    def check_merged(self, adapter_name: str, request: Request) -> None:
        """Refuse a request for other tasks than the merged one."""
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


def _autocast_dtype(network: HyperAdapterNetwork) -> torch.dtype | None:
    """What layers would cast each A and B to, in fewer calls for all positions at once; None outside autocast."""
    kind = network.hypernetwork.layer_embedding.device.type
    is_enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_enabled else None
