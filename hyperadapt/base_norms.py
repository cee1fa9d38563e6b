"""Frobenius norms of base weights, the unit of bounds and gains."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from hyperadapt.layer import HyperAdapterLayer
from hyperadapt.positions import Position

# Columns of a weight that are computed at once where it cannot be read.
_COLUMNS = 512


@torch.no_grad()
def base_norm(layer: HyperAdapterLayer, position: Position) -> Tensor:
    """Frobenius norm of a layer's base weight.

    An offloaded weight is brought in for the time. A quantised weight is dequantised; where its backend cannot (GPTQ,
    AWQ and others), the base layer is applied to the identity matrix.

    Args:
        layer: The adapted layer.
        position: Its position.

    Returns:
        A scalar on the CPU, float32.

    Raises:
        ValueError: If the weight is on the meta device, or its norm is zero or not finite.
    """
    with onload_layer(layer):
        try:
            weight = layer.get_base_weight()
        except (TypeError, NotImplementedError):
            norm = _norm_by_columns(layer.get_base_layer(), position.in_features)
        else:
            if weight.is_meta:
                raise ValueError(
                    f"The weight of module {position.name!r} is on the meta device, so its norm, the unit of bounds "
                    "and gains, is unknown. Load the base model's weights first, or load a saved adapter, which "
                    "carries the norms, with low_cpu_mem_usage=True."
                )
            # Summed in float32 at least, as vector_norm refuses to narrow float64.
            norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    norm = norm.float().cpu()
    if not torch.isfinite(norm) or norm == 0:
        raise ValueError(
            f"The weight of module {position.name!r} has Frobenius norm {norm.item()}, which cannot be the unit of "
            "bounds and gains. Leave the module out with exclude_modules."
        )
    return norm


def _norm_by_columns(base_layer: nn.Module, in_features: int) -> Tensor:
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    identity = torch.eye(in_features, dtype=dtype, device=tensors[0].device if tensors else None)
    bias = base_layer(torch.zeros_like(identity[:1]))
    parts = [(base_layer(rows) - bias).double().square().sum() for rows in torch.split(identity, _COLUMNS)]
    return torch.stack(parts).sum().sqrt()
