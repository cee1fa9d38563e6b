"""An adapted layer for each type of module, and which modules can be adapted."""

from __future__ import annotations

import math
import warnings

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.quantization_utils import (
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Convolution, Factors, without_column
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.router import Router
from hyperadapt.tuner.layer import HyperAdapterLayer


class HyperAdapterLinear(HyperAdapterLayer):
    """Adapts ``nn.Linear``, transformers' ``Conv1D``, or a quantised linear layer.

    PEFT's ``"all-linear"`` finds layers that are already adapted by "Linear" in the name of their class.
    """

    def position_at(self, name: str, r: int, scaling: float) -> Position:
        """With ``Conv1D`` told apart, whose weight is transposed."""
        kind = "Conv1D" if isinstance(self.get_base_layer(), Conv1D) else "Linear"
        return Position(name, self.in_features, self.out_features, r, scaling, kind)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """As ``convert_to_lora`` asks."""
        return True

    def _add_update(
        self, result: Tensor, adapter_name: str, x: Tensor, factors: Factors, rows: Tensor | None
    ) -> Tensor:
        return factors.apply(self._adapter_input(adapter_name, x, factors), rows, onto=result)

    def _dense(self, factors: Factors) -> Tensor:
        delta_weight = factors.delta_weight()[0]
        return delta_weight.T if isinstance(self.get_base_layer(), Conv1D) else delta_weight


class HyperAdapterEmbedding(HyperAdapterLayer):
    """Adapts ``nn.Embedding``; as with PEFT's LoRA, there is no dropout and a padding index keeps its embedding."""

    def position_at(self, name: str, r: int, scaling: float) -> Position:
        """With the padding index."""
        sizes = self.in_features, self.out_features
        return Position(name, *sizes, r, scaling, "Embedding", padding_idx=self.padding_idx)

    def _add_update(
        self, result: Tensor, adapter_name: str, x: Tensor, factors: Factors, rows: Tensor | None
    ) -> Tensor:
        update = factors.embed(x, rows)
        if self.padding_idx is not None:
            update = update.masked_fill((x == self.padding_idx).unsqueeze(-1), 0)
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        return result + (update if scale is None else update * scale.to(update.dtype))

    def _dense(self, factors: Factors) -> Tensor:
        return without_column(factors.delta_weight()[0], self.padding_idx).T

    @property
    def padding_idx(self) -> int | None:
        """The base layer's padding index."""
        base_layer = self.get_base_layer()
        assert isinstance(base_layer, nn.Embedding)
        return base_layer.padding_idx


class HyperAdapterConvolution(HyperAdapterLayer):
    """Adapts ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, as the matrix of output channels by kernel entries."""

    @property
    def in_features(self) -> int:
        """Entries of one output channel's kernel."""
        return math.prod(self.convolution.weight.shape[1:])

    def position_at(self, name: str, r: int, scaling: float) -> Position:
        """With the shape of the kernel."""
        kernel = tuple(self.convolution.weight.shape[1:])
        return Position(name, self.in_features, self.out_features, r, scaling, "Convolution", kernel)

    @property
    def convolution(self) -> Convolution:
        """The base layer."""
        base_layer = self.get_base_layer()
        assert isinstance(base_layer, Convolution)
        return base_layer

    def _add_update(
        self, result: Tensor, adapter_name: str, x: Tensor, factors: Factors, rows: Tensor | None
    ) -> Tensor:
        return result + factors.convolve(self._adapter_input(adapter_name, x, factors), rows, self.convolution)

    def _dense(self, factors: Factors) -> Tensor:
        return factors.delta_weight()[0].reshape(self.convolution.weight.shape)


def wrapped(target: nn.Module, parent: nn.Module, name: str, model: nn.Module, router: Router) -> HyperAdapterLayer:
    """An adapted layer around a module of the model, by its type; refuses modules that cannot be adapted."""
    backend = resolve_quantization_backend(target, **get_quantization_kwargs(model))
    layer_type = _type_or_reason(target, parent, backend)
    if isinstance(layer_type, str):
        raise TypeError(
            f"Module {name!r} is {layer_type}, which hyperadapters cannot adapt: they adapt linear layers (nn.Linear, "
            "Conv1D and quantised linear layers), nn.Embedding and convolutions with one group. Take it out of "
            "target_modules, or list it in exclude_modules."
        )
    layer = layer_type(target, router, backend)
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_refuse_nested)
    return layer


def _refuse_nested(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook whose presence makes nn.TransformerEncoderLayer call the layer, instead of reading its base weight."""
    if args[0].is_nested:
        raise TypeError(
            "nn.TransformerEncoder has packed its padded rows into a nested tensor, which adapted layers cannot take. "
            "Set use_nested_tensor=False on it, or make it with enable_nested_tensor=False."
        )


def choose_all_linear(config: HyperAdapterConfig, model: nn.Module) -> None:
    """Resolve ``"all-linear"`` as PEFT does, but leave out, with one warning, what cannot be adapted.

    Where nothing can, all stays, to be refused by name.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    _maybe_include_all_linear_layers(config, model)
    left_out: dict[str, list[str]] = {}
    for name in sorted(config.target_modules):
        target, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(model))
        reason = None if isinstance(target, HyperAdapterLayer) else _type_or_reason(target, parent, backend)
        if isinstance(reason, str) and BaseTuner._check_target_module_exists(config, name):
            left_out.setdefault(reason, []).append(name)
    kept = set(config.target_modules).difference(*left_out.values())
    if left_out and kept:
        config.target_modules = kept  # type: ignore[assignment]
        reasons = "; ".join(f"{', '.join(map(repr, names))} ({reason})" for reason, names in left_out.items())
        warnings.warn(
            f"target_modules='all-linear' leaves out what hyperadapters cannot adapt: {reasons}. List these modules in "
            "exclude_modules to silence this.",
            stacklevel=2,
        )


def _type_or_reason(
    target: nn.Module, parent: nn.Module, backend: QuantizationBackend | None
) -> type[HyperAdapterLayer] | str:
    """The adapted layer for a module, or what it is that cannot be adapted."""
    if isinstance(parent, nn.MultiheadAttention):
        return "part of nn.MultiheadAttention, which reads its weight without calling it"
    if isinstance(target, Convolution) and target.groups > 1:
        return f"a convolution with groups={target.groups}"
    if not isinstance(target, BaseTunerLayer):
        if isinstance(target, nn.Linear | Conv1D) or (backend is not None and backend.layer_type == "linear"):
            return HyperAdapterLinear
        if isinstance(target, nn.Embedding):
            return HyperAdapterEmbedding
        if isinstance(target, Convolution):
            return HyperAdapterConvolution
    return f"of type {type(target).__name__}"
