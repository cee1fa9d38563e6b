"""The adapted layers: thin wrappers that apply generated factors and can merge them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.router import Router


def layers_in(module: nn.Module) -> list[HyperAdapterLayer]:
    """The adapted layers of a model or of a part of it."""
    return [layer for layer in module.modules() if isinstance(layer, HyperAdapterLayer)]


def names_in(module: nn.Module) -> list[str]:
    """Of the positions in a model or in a part of it."""
    layers = layers_in(module)
    return list(dict.fromkeys(one.name for layer in layers for one in layer.hyperadapter_position.values()))


class HyperAdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of the base model; owns no weights of its own. Each type of module has a subclass.

    ``quantization_backend`` is PEFT's for the base layer; None if that is not quantised.
    """

    # A property: PEFT's generic code reaches the tuner's networks through any layer, for
    # requires_grad, deletion and status, without their being registered here.
    adapter_layer_names = ("hyperadapter_networks",)
    other_param_names = ("hyperadapter_position", "hyperadapter_dropout")

    def __init__(self, base_layer: nn.Module, router: Router, quantization_backend: QuantizationBackend | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.router = router
        self.quantization_backend = quantization_backend
        self.hyperadapter_position: dict[str, Position] = {}
        self.hyperadapter_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_factors: dict[str, Factors] = {}

    @property
    def in_features(self) -> int:
        """Columns of the factor A."""
        in_features, _ = _get_in_out_features(self.get_base_layer())
        assert in_features is not None
        return in_features

    @property
    def out_features(self) -> int:
        """Rows of the factor B."""
        _, out_features = _get_in_out_features(self.get_base_layer())
        assert out_features is not None
        return out_features

    def position_at(self, name: str, r: int, scaling: float) -> Position:
        """The layer's position in the base model, under a path, with a rank and a scaling."""
        raise NotImplementedError

    @property
    def hyperadapter_networks(self) -> nn.ModuleDict:
        """The tuner's networks by adapter name."""
        return self.router.networks

    def update_layer(self, adapter_name: str, position: Position, lora_dropout: float) -> None:
        """Take part in one more adapter, with a dropout on its input."""
        self.hyperadapter_position[adapter_name] = position
        self.hyperadapter_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()

    def remove_adapter(self, adapter_name: str) -> None:
        """Undo ``update_layer``."""
        self.hyperadapter_position.pop(adapter_name, None)
        if adapter_name in self.hyperadapter_dropout:
            del self.hyperadapter_dropout[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus the active adapters' updates, in the shape and dtype of the base layer's output."""
        # The same for every adapter; none where all are deleted.
        position = next(iter(self.hyperadapter_position.values()), None)
        if position is not None and self.router.records(position.name, x):
            recorded: Tensor = self.base_layer(x, *args, **kwargs)
            return recorded
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        self._check_merged_part()
        active = [
            name
            for name in self.active_adapters
            if name in self.hyperadapter_position and name not in self.merged_adapters
        ]
        if active and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for name in active:
            position = self.hyperadapter_position[name]
            factors, rows = self.router.lookup(name, position, x)
            rows = None if rows is None else rows.to(x.device)
            result = self._add_update(result, name, x, factors.to(x.device), rows)
        return result.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense update of the task in force, in the shape of the base weight."""
        return self._dense(self._factors(adapter_name, self.router.task_in_force(adapter_name)))

    # Weights made in inference mode could not be trained; leaving that mode switches gradients on.
    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of the task in force to the base weight; ``safe_merge`` refuses what is not finite."""
        self.check_mergeable()
        if safe_merge:
            self.check_finite(adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.hyperadapter_position:
                continue
            task = self.router.task_in_force(name)
            factors = self._factors(name, task)
            with self._brought_in():
                weight = self.get_base_weight()
                self.set_base_weight(weight + self._dense(factors).to(weight))
            self._merged_factors[name] = factors
            self.merged_adapters.append(name)
            self.router.note_merged(name, task)

    def check_mergeable(self) -> None:
        """Refuse a base weight that is quantised in a way that PEFT cannot write to."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"Merging into {backend.backend_name} layers is not possible: PEFT cannot write to their weights. Use "
                "the task unmerged (set_task), or export it with export_lora."
            )
        # Where all is merged already, merging only warns.
        if not set(self.active_adapters) <= set(self.merged_adapters):
            self._check_readable()

    def check_active(self, adapter_names: Sequence[str]) -> None:
        """Refuse to act for one of several models, whose adapters are not those in force here."""
        for name in self.active_adapters if self.router.is_shared else ():
            if name in self.hyperadapter_position and name not in adapter_names:
                raise self.router.other_model(name, adapter_names)

    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Refuse what ``merge`` would write where it is not finite."""
        merged = self.get_base_weight()
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.hyperadapter_position and name not in self.merged_adapters:
                merged = merged + self.get_delta_weight(name).to(merged)
                if not torch.isfinite(merged).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken at module "
                        f"{self.hyperadapter_position[name].name!r}; nothing was merged."
                    )

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was merged, whatever has been pinned or trained since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._brought_in():
            self.set_base_weight(self.unmerged_weight())
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            del self._merged_factors[name]
            self.router.note_unmerged(name)

    def unmerged_weight(self) -> Tensor:
        """The base weight without what is merged into it."""
        if self.merged:
            self._check_readable()
        weight = self.get_base_weight()
        for name in reversed(self.merged_adapters):
            weight = weight - self._dense(self._merged_factors[name]).to(weight)
        return weight

    def _brought_in(self) -> AbstractContextManager[None]:
        """What holds an offloaded base weight in memory, and puts it away as it is then; PEFT does not always do so."""
        return onload_layer(self) if self.weight.is_meta else nullcontext()

    @property
    def is_packed(self) -> bool:
        """Whether bitsandbytes has laid 4-bit weights out for inference, as on some CPUs; PEFT misreads them then."""
        state = getattr(getattr(self.get_base_layer(), "weight", None), "quant_state", None)
        return bool(getattr(state, "packing_format_for_cpu", False))

    def _check_readable(self) -> None:
        if self.is_packed:
            raise TypeError(
                "bitsandbytes has laid these 4-bit weights out for inference on this CPU, and PEFT misreads them now. "
                "Load the base model and the adapter again and merge before the first forward pass, or use the task "
                "unmerged (set_task)."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` can read the update; it takes linear layers."""
        return False

    def _check_merged_part(self) -> None:
        if self.merged:
            self.router.check_merged_part(name for name in self.merged_adapters if name in self.active_adapters)

    def _factors(self, adapter_name: str, task: str) -> Factors:
        position = self.hyperadapter_position[adapter_name]
        with torch.no_grad():
            return self.router.factors_of_task(adapter_name, task, [position])[position.name]

    def _add_update(
        self, result: Tensor, adapter_name: str, x: Tensor, factors: Factors, rows: Tensor | None
    ) -> Tensor:
        """The output with what an adapter adds to it."""
        raise NotImplementedError

    def _dense(self, factors: Factors) -> Tensor:
        """The update of the base weight, in its shape."""
        raise NotImplementedError

    def _adapter_input(self, adapter_name: str, x: Tensor, factors: Factors) -> Tensor:
        dropped: Tensor = self.hyperadapter_dropout[adapter_name](self._cast_input_dtype(x, factors.lora_A.dtype))
        return dropped

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would move the network, which all layers share, to the device of the last one, be it meta, and round its
        # weights and norms to the base's dtype.
        position = self.hyperadapter_position.get(adapter_name)
        if position is None or position != self.router.network(adapter_name).positions[0]:
            return
        network = self.router.network(adapter_name)
        with align_module_device(self.get_base_layer()):
            device = self.weight.device if device is None else torch.device(device)
        if device.type != "meta" and not any(parameter.is_meta for parameter in network.parameters()):
            network.to(device)

    def _get_available_adapters(self) -> set[str]:
        return set(self.hyperadapter_position)

    def extra_repr(self) -> str:
        """The backend of a quantised base layer, as PEFT's layers show it."""
        shown: str = quantization_extra_repr(self)
        return shown

    def __repr__(self) -> str:
        return "hyperadapt." + super().__repr__()
