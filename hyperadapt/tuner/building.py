"""What an adapter is built of: a base model's router, its network, and taking an adapter out of the modules again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import saved_positions
from hyperadapt.routing.router import Router
from hyperadapt.tasks.encoders import with_text_vectors
from hyperadapt.tuner.base_facts import base_facts
from hyperadapt.tuner.example_features import with_example_sizes
from hyperadapt.tuner.layer import HyperAdapterLayer, layers_in
from hyperadapt.tuner.loading import check_saved_modules, check_size, other_names


def router_of(model: nn.Module, observe: Callable[..., None]) -> Router:
    """The router of a base model's layers, which all models made from it share; a new one if it has none.

    A new one observes the base model's input. Refused where a second model could not reach the layers, or would be
    built on merged weights.
    """
    router = next((layer.router for layer in layers_in(model)), None)
    if router is None:
        router = Router(nn.ModuleDict())
        # The task-specific PeftModels hide their inputs from the tuner, and generate changes them and calls parts by
        # themselves. Not registered for each call, because that cannot be compiled.
        parts = [(name, part) for name, part in model.named_modules() if not name or isinstance(part, PreTrainedModel)]
        router.observers = [
            part.register_forward_pre_hook(partial(observe, name), with_kwargs=True) for name, part in parts
        ]
        return router
    is_wrapped = any(isinstance(one, BaseTuner) and one.tuner_layer_cls is HyperAdapterLayer for one in model.modules())
    if is_wrapped or not hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} is not the base model of the hyperadapter in it, so a second model around it "
            "would go past that one. Add an adapter to the first with add_adapter or load_adapter, pass its base model "
            "(get_base_model()), or take the adapter out with unload()."
        )
    for adapter_name, task in router.merged.items():
        raise ValueError(
            f"Task {task!r} of adapter {adapter_name!r} is merged into the weights of this base model. Call "
            "unmerge_adapter() on the model it belongs to, or merge_and_unload() to keep it, and then make another one."
        )
    router.last_pin = None
    router.is_shared = True
    return router


def check_in_use(model: nn.Module, router: Router) -> None:
    """Refuse the router of a model whose base model was unloaded and then adapted anew."""
    if not router.is_observing and hasattr(model, "peft_config"):
        raise ValueError(
            "This model was unloaded, and another one has been made from its base model since. Use that one, or load "
            "this adapter again."
        )


def built_network(
    base_model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    layers: Sequence[HyperAdapterLayer],
    base_norms: Mapping[str, Tensor],
) -> HyperAdapterNetwork:
    """The network of an adapter, on the device and in the dtype of its first layer; norms are by position name."""
    assert isinstance(config, HyperAdapterConfig)
    given = config
    positions = [layer.hyperadapter_position[adapter_name] for layer in layers]
    unread = torch.tensor(math.nan)
    norms = torch.cat([base_norms.get(one.name, unread).expand(one.weights) for one in positions])
    check_saved_modules(base_model, adapter_name)
    config, text_vectors = with_text_vectors(config)
    config = with_example_sizes(config, base_model)
    size = sum(parameter.numel() for parameter in base_model.parameters())
    check_size(config, positions, size, "the base model")
    config = config.replaced(
        adapted_model=base_facts(base_model, positions, config.modules_to_save or ()).saved(),
        adapted_modules=saved_positions(positions),
    )
    network = HyperAdapterNetwork(config, positions, norms)
    others = layers[0].hyperadapter_networks
    check_adapter_names(base_model, {**others, adapter_name: network})
    # Offloaded weights show the meta device until they are needed.
    with align_module_device(layers[0].get_base_layer()):
        weight = layers[0].weight
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.get_default_dtype()
    device = None if next(network.parameters()).is_meta else weight.device
    network.to(device, dtype)
    # Only the parameters take the base's dtype: norms and vectors rounded to it would stay rounded.
    network.base_norms = norms.to(device)
    network.task_embedding.keep_float()
    if text_vectors is not None:
        network.task_embedding.set_text_vectors(text_vectors)
    for other in others.values():
        assert isinstance(other, HyperAdapterNetwork)
        # How TRL makes its reference, into which it copies the parameters alone.
        if other.config is given:
            network.take_untrained(other)
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


def take_out(model: nn.Module, router: Router, adapter_name: str) -> None:
    """Make room for an adapter where another model made from this base model has left one of that name."""
    if adapter_name not in router.networks:
        return
    warnings.warn(
        f"Adapter {adapter_name!r} of this base model is replaced: models made from it before now use the new one. "
        "Pass another adapter_name to keep both, or take the first out with unload().",
        stacklevel=2,
    )
    _unwrap_saved_modules(model, adapter_name)
    # Layers inside of others, as those of experts are, come first.
    for name, layer in reversed(list(model.named_modules())):
        if isinstance(layer, HyperAdapterLayer):
            layer.remove_adapter(adapter_name)
            if not layer.hyperadapter_position:
                model.set_submodule(name, layer.base_layer)
    del router.networks[adapter_name]
    router.forget(adapter_name)


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
