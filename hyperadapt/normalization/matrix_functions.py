"""Functions of small symmetric and square matrices whose gradients stay finite where autograd's do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def inverse_sqrt(gram: Tensor) -> Tensor:
    """Inverse square root G^(-1/2) of a symmetric positive semi-definite matrix.

    Directions of eigenvalue zero are left out (pseudo-inverse). The gradient is the Daleckii-Krein
    formula with the divided difference written as ``-1/(√λi·√λj·(√λi+√λj))``, which is finite at repeated
    eigenvalues; autograd through ``eigh`` divides by ``λi - λj``.

    Args:
        gram: Shape ``(..., r, r)``, symmetric, float32 or float64.

    Returns:
        Same shape and dtype.
    """
    result: Tensor = _PsdPower.apply(gram, -0.5)  # type: ignore[no-untyped-call]
    return result


def sqrt(gram: Tensor) -> Tensor:
    """Square root G^(1/2) of a symmetric positive semi-definite matrix.

    Args:
        gram: Shape ``(..., r, r)``, symmetric, float32 or float64.

    Returns:
        Same shape and dtype.
    """
    result: Tensor = _PsdPower.apply(gram, 0.5)  # type: ignore[no-untyped-call]
    return result


def polar_factor(matrix: Tensor) -> Tensor:
    """Orthogonal polar factor U·Vᵀ of ``M = U·Σ·Vᵀ``.

    The gradient needs the singular values only as ``1/(σi + σj)``, so it is finite at repeated
    singular values; pairs whose sum is zero get none.

    Args:
        matrix: Shape ``(..., r, r)``, float32 or float64.

    Returns:
        Same shape and dtype.
    """
    result: Tensor = _Polar.apply(matrix)  # type: ignore[no-untyped-call]
    return result


def spectral_norm(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Largest singular value σ of B·A from the factors' Gram matrices.

    With R = G_B^(1/2), the symmetric R·G_A·R has the eigenvalues σ². Its top eigenvector v gives q = R·v
    and p = G_A·q/σ², and ∂σ/∂G_A = q·qᵀ/(2σ), ∂σ/∂G_B = σ·p·pᵀ/2. Where σ is zero the gradient is zero;
    where the two largest singular values are equal, it is that of one of them (a subgradient).

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.

    Returns:
        Shape ``(...)``, same dtype, in units of the weights.
    """
    result: Tensor = _SpectralNorm.apply(gram_A, gram_B)  # type: ignore[no-untyped-call]
    return result


def sinkhorn(logits: Tensor, *, iterations: int, temperature: float) -> Tensor:
    """Doubly stochastic matrix by alternating column and row normalisation of ``exp(logits / temperature)``.

    Works on logarithms, so no entry over- or underflows; gradients run through the iterations.

    Source: Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices" (1967);
    on exp of generated entries as in manifold-constrained hyper-connections (arXiv 2512.24880).

    Args:
        logits: Shape ``(..., r, r)``, float32 or float64.
        iterations: Number of passes over columns and rows.
        temperature: Divides the logits; small values approach a permutation and need more iterations.

    Returns:
        Same shape and dtype; rows sum to 1, columns do in the limit.
    """
    logarithm = logits / temperature
    for _ in range(iterations):
        logarithm = logarithm - logarithm.logsumexp(dim=-2, keepdim=True)
        logarithm = logarithm - logarithm.logsumexp(dim=-1, keepdim=True)
    return logarithm.exp()


def reciprocal(x: Tensor) -> Tensor:
    """Reciprocal of a non-negative tensor, with 0 for 0 (and for subnormal numbers) and a gradient of 0 there.

    Args:
        x: Any shape, floating point, not negative.

    Returns:
        Same shape and dtype.
    """
    normal = x >= torch.finfo(x.dtype).tiny
    # The inner `where` keeps the gradient at 0 from being 0·inf. Dividing by the constant x twice, instead of by
    # x², keeps that of a small x from overflowing.
    safe = torch.where(normal, x, 1)
    scale = safe.detach()
    return torch.where(normal, 1 / (safe / scale) / scale, 0)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues clamped at what rounding leaves of zero, and eigenvectors, in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    noise = values[..., -1:].clamp(min=0) * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.where(values > noise, values, 0), vectors


class _PsdPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, power: float) -> Tensor:
        values, vectors = _eigh(gram)
        roots = values.sqrt()
        function = roots if power > 0 else reciprocal(roots)
        ctx.save_for_backward(roots, vectors)
        ctx.power = power
        result: Tensor = (vectors * function.unsqueeze(-2)) @ vectors.mT
        return result.to(gram.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        roots, vectors = ctx.saved_tensors
        row, column = roots.unsqueeze(-1), roots.unsqueeze(-2)
        divided = reciprocal(row + column) if ctx.power > 0 else -reciprocal(row * column * (row + column))
        grad_64 = (grad + grad.mT).double() / 2
        result: Tensor = vectors @ (divided * (vectors.mT @ grad_64 @ vectors)) @ vectors.mT
        return result.to(grad.dtype), None


class _Polar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        left, values, right_h = torch.linalg.svd(matrix.double())
        ctx.save_for_backward(left, values, right_h)
        result: Tensor = left @ right_h
        return result.to(matrix.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        left, values, right_h = ctx.saved_tensors
        inner = left.mT @ grad.double() @ right_h.mT
        skew = (inner - inner.mT) * reciprocal(values.unsqueeze(-1) + values.unsqueeze(-2))
        result: Tensor = left @ skew @ right_h
        return result.to(grad.dtype)


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram_A: Tensor, gram_B: Tensor) -> Tensor:
        values_B, vectors_B = _eigh(gram_B)
        root = (vectors_B * values_B.sqrt().unsqueeze(-2)) @ vectors_B.mT
        values, vectors = torch.linalg.eigh(root @ gram_A.double() @ root)
        sigma: Tensor = values[..., -1].clamp(min=0).sqrt()
        q = (root @ vectors[..., -1:]).squeeze(-1)
        ctx.save_for_backward(sigma, q, gram_A)
        return sigma.to(gram_A.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        sigma, q, gram_A = ctx.saved_tensors
        inverse = reciprocal(sigma)[..., None]
        p = (gram_A.double() @ q.unsqueeze(-1)).squeeze(-1) * inverse**2
        scale = grad.double()[..., None, None] / 2
        grad_A: Tensor = scale * inverse[..., None] * q.unsqueeze(-1) * q.unsqueeze(-2)
        grad_B: Tensor = scale * sigma[..., None, None] * p.unsqueeze(-1) * p.unsqueeze(-2)
        return grad_A.to(grad.dtype), grad_B.to(grad.dtype)
