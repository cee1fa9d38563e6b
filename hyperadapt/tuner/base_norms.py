"""Frobenius norms of base weights, the unit of bounds and gains."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hyperadapt.hypernetwork.positions import Position
from hyperadapt.tuner.layer import HyperAdapterLayer

# Columns of a weight that are computed at once where it cannot be read.
_COLUMNS = 512


def is_made_empty() -> bool:
    """Whether parameters made now get no memory, because a file will bring them.

    So it is inside of PEFT's ``init_empty_weights``: a tuner is told of ``low_cpu_mem_usage`` in no other way.
    """
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return probe.get_parameter("probe").is_meta


@torch.no_grad()
def base_norm(layer: HyperAdapterLayer, position: Position) -> Tensor:
    """Frobenius norm of a layer's base weight, a float32 scalar on the CPU; those of experts, ``(experts,)``.

    An offloaded weight is brought in for the time. A quantised weight is dequantised; where that is not possible (GPTQ,
    AWQ and others), the base layer is applied to the identity matrix. A norm that is zero, not finite or unknown is
    refused.
    """
    base_layer = layer.get_base_layer()
    # PEFT's onload_layer would leave weights in memory that were offloaded to disk.
    with align_module_device(base_layer):
        tensors = [*base_layer.parameters(), *base_layer.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"The weight of module {position.name!r} is on the meta device, so its norm, the unit of bounds "
                "and gains, is unknown. Load the base model's weights first, or load a saved adapter, which "
                "carries the norms, with low_cpu_mem_usage=True."
            )
        try:
            weight = None if layer.is_packed else layer.get_base_weight()
        except (TypeError, NotImplementedError):
            weight = None
        if layer.merged:
            weight = layer.unmerged_weight()
        # A float8 weight may come with scales.
        if weight is None or weight.itemsize == 1:
            norm = _norm_by_columns(base_layer, position, tensors)
        else:
            # Summed in float32 at least, as vector_norm refuses to narrow float64.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            norm = torch.linalg.vector_norm(weight, dim=(1, 2) if position.experts else None, dtype=dtype)
    norm = norm.float().cpu()
    useless = ~norm.isfinite() | (norm == 0)
    if useless.any():
        expert = f" of expert {useless.nonzero()[0].item()}" if position.experts else ""
        raise ValueError(
            f"The weight{expert} of module {position.name!r} has Frobenius norm {norm[useless][0].item()}, which "
            "cannot be the unit of bounds and gains. Leave the module out with exclude_modules."
        )
    return norm


def _norm_by_columns(base_layer: nn.Module, position: Position, tensors: list[Tensor]) -> Tensor:
    floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.itemsize > 1)
    dtype = next(floating, torch.get_default_dtype())
    device = tensors[0].device if tensors else torch.device("cpu")
    width = position.in_features
    total = torch.zeros((), dtype=torch.float64)
    try:
        bias = base_layer(torch.zeros(1, width, dtype=dtype, device=device))
        for start in range(0, width, _COLUMNS):
            rows = torch.zeros(min(_COLUMNS, width - start), width, dtype=dtype, device=device)
            rows.diagonal(start).fill_(1)
            total += (base_layer(rows) - bias).float().square().sum().double().cpu()
    except Exception as error:
        raise ValueError(
            f"The norm of the weight of module {position.name!r}, the unit of bounds and gains, cannot be found: the "
            f"{type(base_layer).__name__} can neither be dequantised nor applied to a {dtype} matrix on {device}. Move "
            "the base model to a device that it runs on first, or leave the module out with exclude_modules."
        ) from error
    return total.sqrt()
