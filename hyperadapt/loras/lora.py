"""The LoRA of one task, as it is exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor

from hyperadapt.config.adapted_fields import AdaptedModel
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors, without_column
from hyperadapt.hypernetwork.positions import Position

# Servers make room for LoRAs of these ranks.
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Lora:
    """The LoRA of one task, of one rank everywhere; its scaling is in the factors."""

    # Of the hyperadapter, and what that knows of its base model.
    adapter: HyperAdapterConfig
    base: AdaptedModel
    config: LoraConfig
    positions: Mapping[str, Position]
    # By module path the tensors by the ends of their names in a saved adapter: ``lora_A.weight`` (r, in_features) and
    # ``lora_B.weight`` (out_features, r).
    factors: Mapping[str, Mapping[str, Tensor]]
    # Parameters of the modules trained in full, by name in a saved adapter.
    saved: Mapping[str, Tensor]
    # None where a description alone asked for it.
    task: str | None
    descriptions: Sequence[str]

    def named_factors(self, prefix: str) -> dict[str, Tensor]:
        """A and B of all modules by their names in a file, which start with `prefix`."""
        return {f"{prefix}{path}.{end}": tensor for path, pair in self.factors.items() for end, tensor in pair.items()}


def uniform_rank(ranks: Iterable[int]) -> int:
    """The rank that a LoRA gets everywhere: the smallest of ``RANKS`` that holds all, else the largest rank itself."""
    largest = max(ranks)
    return next((rank for rank in RANKS if rank >= largest), largest)


def lora_tensors(position: Position, factors: Factors, r: int) -> dict[str, Tensor]:
    """One task's update as PEFT's LoRA layer would save it, by the ends of the names; scaling 1, zeros up to rank r."""
    lora_A = _with_zeros(factors.lora_A[0].cpu(), r, 0)
    lora_B = _with_zeros(factors.outer()[0].cpu(), r, 1)
    if position.kind == "Embedding":
        return {"lora_embedding_A": without_column(lora_A, position.padding_idx), "lora_embedding_B": lora_B}
    if position.kernel is not None:
        # A is a convolution with the base layer's kernel, B one with a kernel of size 1.
        lora_A = lora_A.reshape(-1, *position.kernel)
        lora_B = lora_B.reshape(*lora_B.shape, *(1 for _ in position.kernel[1:]))
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def _with_zeros(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A factor, contiguous, with zeros added up to a size."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
