"""The LoRA of one task, as it is exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn

# Servers make room for LoRAs of these ranks.
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Lora:
    """The LoRA of one task, of one rank everywhere; its scaling is in the factors.

    Args:
        base_model: The model that it adapts.
        config: Its configuration in PEFT.
        factors: By module path the tensors by the ends of their names in a saved adapter, such as ``lora_A.weight``;
            A has `config.r` rows, B has as many columns.
        saved: Parameters of the modules trained in full, by name in a saved adapter.
    """

    base_model: nn.Module
    config: LoraConfig
    factors: Mapping[str, Mapping[str, Tensor]]
    saved: Mapping[str, Tensor]

    def named_factors(self, prefix: str) -> dict[str, Tensor]:
        """The factors by their names in a file.

        Args:
            prefix: What the names start with.

        Returns:
            A and B of all modules.
        """
        return {f"{prefix}{path}.{end}": tensor for path, pair in self.factors.items() for end, tensor in pair.items()}


def uniform_rank(ranks: Iterable[int]) -> int:
    """The rank that a LoRA gets everywhere.

    Args:
        ranks: The ranks of its modules.

    Returns:
        The smallest of ``RANKS`` that holds all; if there is none, the largest rank itself.
    """
    largest = max(ranks)
    return next((rank for rank in RANKS if rank >= largest), largest)


def padded(tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """Factors of a higher rank with exactly the same product.

    Args:
        tensors: A and B of a module, in this order, as ``HyperAdapterLayer.lora_tensors`` gives them.
        r: The rank.

    Returns:
        A with rows of zeros added, B with columns of zeros added, on the CPU.
    """
    return {name: _with_zeros(tensor.cpu(), r, dim) for dim, (name, tensor) in enumerate(tensors.items())}


def _with_zeros(tensor: Tensor, size: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
