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
    """The LoRA of one task, of one rank everywhere; its scaling is in the factors."""

    base_model: nn.Module
    config: LoraConfig
    # By module path the tensors by the ends of their names in a saved adapter: ``lora_A.weight`` (r, in_features) and
    # ``lora_B.weight`` (out_features, r).
    factors: Mapping[str, Mapping[str, Tensor]]
    # Parameters of the modules trained in full, by name in a saved adapter.
    saved: Mapping[str, Tensor]

    def named_factors(self, prefix: str) -> dict[str, Tensor]:
        """A and B of all modules by their names in a file, which start with `prefix`."""
        return {f"{prefix}{path}.{end}": tensor for path, pair in self.factors.items() for end, tensor in pair.items()}


def uniform_rank(ranks: Iterable[int]) -> int:
    """The rank that a LoRA gets everywhere: the smallest of ``RANKS`` that holds all, else the largest rank itself."""
    largest = max(ranks)
    return next((rank for rank in RANKS if rank >= largest), largest)


def padded(tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """A module's A ``(r, in)`` and B ``(out, r)``, given in this order, on the CPU, with zeros added up to r."""
    return {name: _with_zeros(tensor.cpu(), r, dim) for dim, (name, tensor) in enumerate(tensors.items())}


def _with_zeros(tensor: Tensor, size: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
