"""Parameters that FSDP2 or DeepSpeed has spread over processes, and how to have them whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hyperadapt.hypernetwork.network import HyperAdapterNetwork


def make_whole(state_dict: dict[str, Tensor], parts: Sequence[str]) -> None:
    """Replace the sharded tensors with one of these parts in their names; under FSDP2 all processes must call this."""
    wanted = [name for name in state_dict if any(part in name for part in parts)]
    for name in wanted:
        _check_entries(name, state_dict[name])
    state_dict |= {name: _whole(state_dict[name]) for name in wanted}


def whole_network(network: HyperAdapterNetwork) -> HyperAdapterNetwork:
    """A network that can be called outside of the model's forward pass; under FSDP2 all processes must call this.

    The network itself; or a copy with whole parameters, and without the hooks that would shard them again.
    """
    for name, parameter in network.named_parameters():
        _check_entries(name, parameter)
    if not any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in network.parameters()):
        return network
    with torch.device("meta"):
        copy = HyperAdapterNetwork(network.config, network.positions, network.base_norms)
    copy.load_state_dict({name: _whole(value) for name, value in network.state_dict().items()}, assign=True)
    return copy.train(network.training)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_entries(name: str, tensor: Tensor) -> None:
    if not tensor.numel():
        raise ValueError(
            f"Parameter {name!r} is partitioned by DeepSpeed's ZeRO-3, so this process has none of its entries. Do "
            "this in all processes, inside of deepspeed.zero.GatheredParameters(list(model.parameters()))."
        )
