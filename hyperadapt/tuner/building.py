"""Building an adapter's network for the modules that it adapts, and taking an adapter out of them again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tasks.encoders import with_text_vectors
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.loading import check_saved_modules, check_size, other_names


def built_network(
    base_model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    layers: Sequence[HyperAdapterLayer],
    base_norms: Mapping[str, Tensor],
) -> HyperAdapterNetwork:
    """The network of an adapter, on the device and in the dtype of its first layer; norms are by position name."""
    assert isinstance(config, HyperAdapterConfig)
    positions = [layer.hyperadapter_position[adapter_name] for layer in layers]
    unread = torch.tensor(math.nan)
    norms = torch.stack([base_norms.get(position.name, unread) for position in positions])
    check_saved_modules(base_model, adapter_name)
    config, text_vectors = with_text_vectors(config)
    check_size(config, positions, base_model)
    network = HyperAdapterNetwork(config, positions, norms)
    check_adapter_names(base_model, {**layers[0].hyperadapter_networks, adapter_name: network})
    # Offloaded weights show the meta device until they are needed.
    with align_module_device(layers[0].get_base_layer()):
        weight = layers[0].weight
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.get_default_dtype()
    device = None if next(network.parameters()).is_meta else weight.device
    network.to(device, dtype)
    # Only the parameters take the base's dtype: norms and text vectors rounded to it would stay rounded.
    network.base_norms = norms.to(device)
    if not network.task_embedding.is_all_learned:
        network.task_embedding.text_vectors = network.task_embedding.text_vectors.float()
    if text_vectors is not None:
        network.task_embedding.set_text_vectors(text_vectors)
    return network


def check_adapter_names(base_model: nn.Module, networks: Mapping[str, nn.Module]) -> None:
    """Refuse an adapter whose name is a part of a tensor's name in another one's file.

    PEFT leaves out of an adapter's file whatever has the name of another adapter in its own.
    """
    for adapter_name, network in networks.items():
        names = [f"hyperadapter_networks.{name}" for name in network.state_dict()]
        names += [f"model.{name}" for name in other_names(base_model, adapter_name)]
        for name in names:
            for other in set(name.split(".")) & (set(networks) - {adapter_name}):
                raise ValueError(
                    f"The adapter name {other!r} is a part of {name!r}, the name of a tensor that the file of adapter "
                    f"{adapter_name!r} may hold, and that PEFT would leave out when it saves both. Choose another name."
                )


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Unwrap the modules of a base model that are wrapped for this adapter alone."""
    _unwrap_saved_modules(model, adapter_name)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, HyperAdapterLayer):
            layer.remove_adapter(adapter_name)
            if not layer.hyperadapter_position:
                model.set_submodule(name, layer.base_layer)


def _unwrap_saved_modules(model: nn.Module, adapter_name: str) -> None:
    """Undo the wrapping of `modules_to_save` for an adapter."""
    unwrapped: list[str] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, AuxiliaryTrainingWrapper) or name.startswith(tuple(unwrapped)):
            continue
        if module._adapters - {adapter_name}:
            active = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=active)
        else:
            model.set_submodule(name, module.original_module)
            unwrapped.append(f"{name}.")
