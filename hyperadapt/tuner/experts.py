"""The adapted layer of fused experts: of one parameter of a module that holds their weights as stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device, named_module_tensors
from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.router import Router
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.stacked_weights import StackedWeights

# Ways of transformers to run experts that use torch's functions alone, and each token by itself.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class _Update(NamedTuple):
    """What one adapter adds to one parameter: left·right for each task, and the task of each token; None for one."""

    parameter_name: str
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    rows: Tensor | None


class HyperAdapterExperts(HyperAdapterLayer):
    """Adapts one parameter of a module of experts; the layers of several parameters lie one inside the other.

    The outermost one calls the module, on the tokens of each task by itself.
    """

    def __init__(self, base_layer: nn.Module, router: Router, parameter_name: str) -> None:
        super().__init__(base_layer, router, None)
        self.parameter_name = parameter_name

    @property
    def weight(self) -> Tensor:
        """The parameter, shape ``(experts, out_features, in_features)``, or transposed."""
        weight: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    @property
    def is_transposed(self) -> bool:
        """Whether inputs come first, as the module tells it; PEFT's LoRA goes by the same."""
        return getattr(self.get_base_layer(), "is_transposed", False)

    @property
    def in_features(self) -> int:
        """Columns of the factor A."""
        return self.weight.shape[1 if self.is_transposed else 2]

    @property
    def out_features(self) -> int:
        """Rows of the factor B."""
        return self.weight.shape[2 if self.is_transposed else 1]

    def position_at(self, name: str, r: int, scaling: float) -> Position:
        """With the number of experts."""
        sizes = self.in_features, self.out_features
        return Position(name, *sizes, r, scaling, "Experts", experts=self.weight.shape[0])

    def get_base_weight(self) -> Tensor:
        """The parameter's data."""
        return self.weight.data

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Replace the parameter's data, also where Accelerate keeps it while it is not in use."""
        self.weight.data = weight_data
        # PEFT's onload_layer puts it there for the innermost layer alone.
        module = self.get_base_layer()
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(module)}

    def layers(self) -> Iterator[HyperAdapterExperts]:
        """This layer and those inside of it."""
        layer: Any = self
        while isinstance(layer, HyperAdapterExperts):
            yield layer
            layer = layer.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module of experts, merged if asked for: PEFT would look at the outermost layer alone."""
        for layer in self.layers() if merge else ():
            layer.merge(safe_merge, adapter_names)
        return self.get_base_layer()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output for tokens ``(tokens, hidden)``, with the active adapters' updates of all layers."""
        position = next(iter(self.hyperadapter_position.values()), None)
        if position is not None and self.router.records(position.name, x):
            recorded: Tensor = self.base_layer(x, *args, **kwargs)
            return recorded
        updates = [update for layer in self.layers() for update in layer._updates(x)]
        if all(update.rows is None for update in updates):
            return self._run(updates, [0] * len(updates), x, args, kwargs)
        if not self._is_known:
            raise ValueError(
                f"Module {self._path!r} of type {type(self.get_base_layer()).__name__} got tokens of several tasks. "
                "Only experts that transformers runs with experts_implementation='eager', 'batched_mm' or 'grouped_mm' "
                "are known to treat each token by itself. Use one task per batch, or leave the parameter out of "
                "target_parameters."
            )
        return self._run_each_task(updates, x, args, kwargs)

    def _run_each_task(self, updates: Sequence[_Update], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Run the module for each combination of tasks on its tokens, and put the tokens back in order."""
        rows = [x.new_zeros(len(x), dtype=torch.int64) if one.rows is None else one.rows for one in updates]
        combinations, members = torch.unique(torch.stack(rows), dim=1, return_inverse=True)
        order = members.argsort(stable=True)
        parts = []
        for tasks, tokens in zip(combinations.T.tolist(), order.split(members.bincount().tolist()), strict=True):
            chosen = [one[tokens] if _is_of_tokens(one, x) else one for one in args]
            named = {name: one[tokens] if _is_of_tokens(one, x) else one for name, one in kwargs.items()}
            parts.append(self._run(updates, tasks, x[tokens], chosen, named))
        return torch.cat(parts)[order.argsort()]

    def _run(self, updates: Sequence[_Update], tasks: Sequence[int], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Run the module with the weights of one task of each update."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for update, task in zip(updates, tasks, strict=True):
            parts.setdefault(update.parameter_name, []).append((update.left[task], update.right[task]))
        module = self.get_base_layer()
        if not parts:
            unchanged: Tensor = module(x, *args, **kwargs)
            return unchanged
        # Offloaded weights are brought in for the time.
        with align_module_device(module):
            # A copy, which shares all that it holds: the module itself may be running in another thread.
            twin = copy.copy(module)
            # An offloading hook would go back to the module.
            vars(twin).pop("forward", None)
            for name, pairs in parts.items():
                left, right = zip(*pairs, strict=True)
                weights = StackedWeights(getattr(module, name), torch.cat(left, -1), torch.cat(right, -2))
                vars(twin)[name] = weights if self._is_known else weights.dense()
            result: Tensor = twin(x, *args, **kwargs)
        return result

    def _updates(self, x: Tensor) -> Iterator[_Update]:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return
        self._check_merged_part()
        for name in self.active_adapters:
            if name not in self.hyperadapter_position or name in self.merged_adapters:
                continue
            factors, rows = self.router.lookup(name, self.hyperadapter_position[name], x)
            if rows is None and len(factors.lora_A) > 1:
                rows = torch.arange(len(x))
            yield self._update(factors.to(x.device), None if rows is None else rows.to(x.device))

    def _update(self, factors: Factors, rows: Tensor | None) -> _Update:
        # The core is a part of B, since half precision would round off what it brings down.
        lora_A, lora_B = (part.to(self.weight.dtype) for part in (factors.lora_A, factors.outer()))
        left, right = (lora_A.mT, lora_B.mT) if self.is_transposed else (lora_B, lora_A)
        return _Update(self.parameter_name, left.unbind(0), right.unbind(0), rows)

    def _dense(self, factors: Factors) -> Tensor:
        delta_weight = factors.delta_weight()[0]
        return delta_weight.mT if self.is_transposed else delta_weight

    @property
    def _is_known(self) -> bool:
        # Transformers sets both in the modules that it runs in its own ways.
        module = self.get_base_layer()
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
        return hasattr(module, "is_transposed") and implementation in _IMPLEMENTATIONS

    @property
    def _path(self) -> str:
        return next(iter(self.hyperadapter_position.values())).name.rpartition(".")[0]

    def extra_repr(self) -> str:
        """The parameter, which tells apart layers of one module."""
        return f"parameter_name={self.parameter_name!r}"


def _is_of_tokens(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(x)
