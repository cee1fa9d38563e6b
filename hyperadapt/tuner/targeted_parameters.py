"""The parameters of a model that `target_parameters` asks for, and the layer of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import _get_submodules
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Convolution
from hyperadapt.routing.router import Router
from hyperadapt.tuner.experts import HyperAdapterExperts


class ParameterTuner(BaseTuner):
    """What a tuner that adapts parameters of experts does in other ways than PEFT's for modules alone."""

    router: Router

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, HyperAdapterConfig)
        # As with PEFT's LoRA, a model without default modules needs none beside parameters.
        is_complete = peft_config.target_parameters and model_config["model_type"] not in self.target_module_mapping
        return peft_config if is_complete else super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        assert isinstance(peft_config, HyperAdapterConfig)
        names = targeted_parameters(peft_config, model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for name in names:
                path, _, parameter_name = name.rpartition(".")
                parent, target, target_name = _get_submodules(model, path)
                layer = layer_of(target, parameter_name, name, self.router)
                if layer.base_layer is target:
                    setattr(parent, target_name, layer)
                self._create_and_replace(peft_config, adapter_name, layer, target_name, parent, name)
        return names


def targeted_parameters(config: HyperAdapterConfig, model: nn.Module) -> list[str]:
    """Paths of the parameters, but for those in layers or modules that the configuration leaves out.

    In the order in which the layers of a module come to lie around it, innermost first: that of PEFT's LoRA.
    """
    entries = config.target_parameters or []
    ndims = {name: parameter.ndim for name, parameter in _parameters(model)}
    for entry in entries:
        if not any(_ends(name, entry) for name in ndims):
            raise _unknown(entry, model, [name for name, ndim in ndims.items() if ndim == 3])
    names = [name for name in ndims if any(_ends(name, entry) for entry in entries) and _is_selected(config, name)]
    if not names:
        raise ValueError(
            f"target_parameters={shown(entries)} are parameters of {type(model).__name__}, but exclude_modules, "
            "modules_to_save or layers_to_transform leave all of them out. Take the parameters out, or these fields."
        )
    for name in names:
        if config.rank_and_scaling(name) != (config.r, config.lora_alpha / config.r):
            raise ValueError(
                f"rank_pattern={shown(config.rank_pattern)} or alpha_pattern={shown(config.alpha_pattern)} matches "
                f"parameter {name!r} of target_parameters, but patterns are for modules: experts get r and lora_alpha. "
                "Write more of the module's path into the pattern."
            )
    adapted = {
        f"{_plain(path)}.{layer.parameter_name}"
        for path, layer in model.named_modules()
        if isinstance(layer, HyperAdapterExperts)
    }
    if adapted and adapted != set(names):
        raise ValueError(
            f"target_parameters={shown(entries)} means {shown(names)}, but another adapter of this model adapts "
            f"{shown(sorted(adapted))}. All adapters with target_parameters must have the same ones, as with PEFT's "
            "LoRA: take both sets, or load the base model anew."
        )
    return names


def layer_of(target: nn.Module, parameter_name: str, name: str, router: Router) -> HyperAdapterExperts:
    """The layer of a parameter with this path: among those around its module, or a new one around them all."""
    for layer in target.layers() if isinstance(target, HyperAdapterExperts) else ():
        if layer.parameter_name == parameter_name:
            return layer
    layer = HyperAdapterExperts(target, router, parameter_name)
    module, weight = layer.get_base_layer(), layer.weight
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding | Convolution):
        raise ValueError(
            f"Parameter {name!r} of target_parameters is the weight of a {type(module).__name__}, not of experts. Name "
            "its module in target_modules instead."
        )
    if weight.ndim != 3:
        raise ValueError(
            f"Parameter {name!r} of target_parameters has shape {tuple(weight.shape)}, but experts' weights have 3 "
            "dimensions: experts, outputs and inputs. Take it out; to train it in full, name its module in "
            "modules_to_save."
        )
    if not weight.is_floating_point() or weight.itemsize == 1:
        raise TypeError(
            f"Parameter {name!r} of target_parameters is quantised ({weight.dtype}), so that updates cannot be added "
            "to it. Load the base model in bfloat16, or take the parameter out."
        )
    if isinstance(target, BaseTunerLayer) and not isinstance(target, HyperAdapterExperts):
        raise ValueError(
            f"Parameter {name!r} of target_parameters is in a module that is adapted already, as a "
            f"{type(target).__name__}. Take the module out of target_modules, or unload the other adapter."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"Parameter {name!r} of target_parameters is spread over processes by its experts, so that each has a part "
            "of them. Load the base model without expert parallelism."
        )
    return layer


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters by their paths in it, module by module."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{_plain(path)}.{name}", parameter


def _plain(path: str) -> str:
    """A path without the layers around modules."""
    return path.replace(".base_layer", "")


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _is_selected(config: HyperAdapterConfig, name: str) -> bool:
    """Whether neither the parameter nor its module is left out, nor its layer."""
    selection = copy.copy(config)
    selection.target_modules = config.target_parameters
    module, parameter = (
        BaseTuner._check_target_module_exists(selection, path) for path in (name.rpartition(".")[0], name)
    )
    return bool(parameter) and not isinstance(module, _ExcludedModule)


def _unknown(entry: str, model: nn.Module, stacks: Sequence[str]) -> Exception:
    """What to raise where no parameter has a name that ends so."""
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", ()):
            if _ends(f"{_plain(path)}.{name}", entry):
                return TypeError(
                    f"Parameter '{_plain(path)}.{name}' of target_parameters is computed from others by a "
                    "parametrisation, as bitsandbytes quantises experts, so that updates cannot be added to it. Load "
                    "the base model without, or take the parameter out."
                )
    found = f"The stacks of weights in it are {shown(stacks)}" if stacks else "It has no stacks of weights"
    return ValueError(
        f"target_parameters holds {shown(entry)}, but no parameter of {type(model).__name__} has a name that ends so. "
        f"{found}; linear layers belong in target_modules."
    )
