"""Inner products and singular values of updates B·S·A from products of the size of the rank.

Factors are not unique: B·M and M⁻¹·A give the same update for every invertible M. So updates are compared, never
their factors, and without forming them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadapt.hypernetwork.factors import Factors, times_core
from hyperadapt.normalization.gram import grams


def inner_product(x: Factors, y: Factors) -> Tensor:
    """Frobenius inner product of updates, shape ``(...)`` of their leading dimensions, which broadcast.

    ⟨B₁·S₁·A₁, B₂·S₂·A₂⟩ = ⟨S₁ᵀ·(B₁ᵀ·B₂)·S₂, A₁·A₂ᵀ⟩, a sum over r₁ × r₂ products, in squared units of the weights.
    Differentiable. The ranks may differ.
    """
    _check_shapes(x, y)
    outer = times_core(times_core(y.lora_B.mT @ x.lora_B, x.core).mT, y.core)
    return (outer * (x.lora_A @ y.lora_A.mT)).sum((-2, -1))


@torch.no_grad()
def pairwise_inner_products(x: Factors, y: Factors) -> Tensor:
    """Frobenius inner product of each of T updates of one position with each of U, shape ``(T, U)``, no gradient.

    In float64, so that the difference of two nearly equal updates can be told from the result.
    """
    _check_shapes(x, y)
    (x_A, x_B), (y_A, y_B) = _rows(x), _rows(y)
    blocks = (x_B.flatten(0, 1) @ y_B.flatten(0, 1).T) * (x_A.flatten(0, 1) @ y_A.flatten(0, 1).T)
    return blocks.reshape(*x_A.shape[:2], *y_A.shape[:2]).sum((1, 3))


@torch.no_grad()
def singular_values(factors: Factors) -> Tensor:
    """Singular values of updates, shape ``(..., min(r, out_features, in_features))``, float64, descending, no gradient.

    With the QR factors of B·S and Aᵀ they are those of a matrix of the size of the rank. Unlike Gram matrices, which
    square the condition, QR keeps values far below the largest.
    """
    lora_A, lora_B = _rows(factors)
    inner = torch.linalg.qr(lora_B.mT, mode="r").R @ torch.linalg.qr(lora_A.mT, mode="r").R.mT
    values: Tensor = torch.linalg.svdvals(inner)
    return values


def spectrum(factors: Factors) -> Tensor:
    """As ``singular_values`` of a position; of experts, place by place, the root of the sum of their squares."""
    values = [singular_values(one) for one in factors.of_weights()]
    # What is squared and brought back is rounded.
    return values[0] if len(values) == 1 else torch.linalg.vector_norm(torch.stack(values), dim=0)


@torch.no_grad()
def update_grams(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Gram matrices of A and of B·S of updates of one rank, shape (updates, tasks, r, r), at least float32."""
    joined = grams([rows[:, None] for rows in (*(one.lora_A for one in factors), *(one.outer().mT for one in factors))])
    gram_A, gram_B = joined.transpose(0, 1).chunk(2)
    return gram_A, gram_B


def _rows(factors: Factors) -> tuple[Tensor, Tensor]:
    """A and (B·S)ᵀ in float64, each of shape (..., r, features)."""
    factors = Factors(*(tensor.double() for tensor in factors))
    return factors.lora_A, factors.outer().mT


def _check_shapes(x: Factors, y: Factors) -> None:
    x_shape, y_shape = ((one.lora_B.shape[-2], one.lora_A.shape[-1]) for one in (x, y))
    if x_shape != y_shape:
        raise ValueError(
            f"Updates of shape {tuple(x_shape)} and {tuple(y_shape)} have no inner product; compare those of one "
            "position."
        )
