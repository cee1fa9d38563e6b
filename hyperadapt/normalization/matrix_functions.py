"""Functions of small symmetric and square matrices whose gradients stay finite where autograd's do not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def inverse_sqrt(gram: Tensor, ridge: float = 0.0) -> Tensor:
    """Inverse square root (G + ridge·m·I)^(-1/2) of a symmetric positive semi-definite matrix of mean eigenvalue m.

    Without a ridge, directions of eigenvalue zero are left out (pseudo-inverse). With one they count as zero and are
    kept, also where the ridge is less than what rounding leaves of zero. The gradient is the Daleckii-Krein
    formula with the divided difference written as ``-1/(√λi·√λj·(√λi+√λj))``, which is finite at repeated
    eigenvalues; autograd through ``eigh`` divides by ``λi - λj``. What is not finite gives NaN.

    Args:
        gram: Shape ``(..., r, r)``, symmetric, float32 or float64.
        ridge: What is added, in units of the mean eigenvalue.

    Returns:
        Same shape and dtype.
    """
    result: Tensor = _InverseSqrt.apply(gram, ridge)  # type: ignore[no-untyped-call]
    return result


def spectral_norm(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Largest singular value σ of B·A from the factors' Gram matrices.

    With R = G_B^(1/2), the symmetric R·G_A·R has the eigenvalues σ². Its top eigenvector v gives q = R·v
    and p = G_A·q/σ², and ∂σ/∂G_A = q·qᵀ/(2σ), ∂σ/∂G_B = σ·p·pᵀ/2. Where σ is zero the gradient is zero;
    where the two largest singular values are equal, it is that of one of them (a subgradient). What is not finite
    gives NaN.

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.

    Returns:
        Shape ``(...)``, same dtype, in units of the weights.
    """
    result: Tensor = _SpectralNorm.apply(gram_A, gram_B)  # type: ignore[no-untyped-call]
    return result


def soft_inverse_sqrt(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Inverse square root (I + G_A·G_B)^(-1/2): B·S·A has the singular values σ/√(1 + σ²), those of B·A being σ.

    With G_A = L·Lᵀ, the symmetric M = Lᵀ·G_B·L has the eigenvalues d = σ² and the eigenvectors U. With V = L·U,
    W = G_B·V and s = √(1 + d), ``S = I - V·h·Wᵀ`` for ``h = (1 - 1/s)/d = 1/(s·(s + 1))``, which divides by no small
    number; nor do the divided differences in its gradient, finite at repeated and at zero σ. Where each σ is above 1,
    S = V·(1/(d·s))·Wᵀ keeps its digits, however large they are. What is not finite gives NaN.

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.

    Returns:
        Same shape and dtype, dimensionless.
    """
    result: Tensor = _SoftInverseSqrt.apply(gram_A, gram_B)  # type: ignore[no-untyped-call]
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
    is_small = x < torch.finfo(x.dtype).tiny
    # The inner `where` keeps the gradient at 0 from being 0·inf. Dividing by the constant x twice, instead of by
    # x², keeps that of a small x from overflowing.
    safe = torch.where(is_small, 1, x)
    scale = safe.detach()
    return torch.where(is_small, 0, 1 / (safe / scale) / scale)


def _eigh_or_nan(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, NaN where the matrix is not finite and a decomposition would raise, and eigenvectors."""
    is_finite = symmetric.isfinite().flatten(-2).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(is_finite[..., None], symmetric, 0))
    return torch.where(is_finite, values, torch.nan), vectors


def _eigh(gram: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues clamped at what rounding leaves of zero, or with a ridge on top, and eigenvectors, in float64."""
    values, vectors = _eigh_or_nan(gram.double())
    if ridge > 0:
        return values.clamp(min=0) + ridge * values.mean(-1, keepdim=True).clamp(min=0), vectors
    noise = values[..., -1:].clamp(min=0) * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.where(values <= noise, 0, values), vectors


def _cholesky(gram: Tensor) -> Tensor:
    """L of G = L·Lᵀ, float64; where rounding left G indefinite, of G with a small share of its diagonal added."""
    r, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
    gram = gram.double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    root, failed = torch.linalg.cholesky_ex(gram)
    # The first share covers rounded sums, the second those of tensor cores, which cut digits off.
    for share in (r * eps, r * math.sqrt(eps)):
        ridge = torch.diag_embed((share * diagonal).clamp(min=torch.finfo(gram.dtype).tiny))
        ridged, ridged_failed = torch.linalg.cholesky_ex(gram + ridge)
        root = torch.where(failed[..., None, None] > 0, ridged, root)
        failed = torch.where(failed > 0, ridged_failed, failed)
    return torch.where(diagonal.unsqueeze(-1) > 0, root, 0)


class _InverseSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, ridge: float) -> Tensor:
        values, vectors = _eigh(gram, ridge)
        roots, ctx.ridge = values.sqrt(), ridge
        ctx.save_for_backward(roots, vectors)
        result: Tensor = (vectors * reciprocal(roots).unsqueeze(-2)) @ vectors.mT
        return result.to(gram.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        roots, vectors = ctx.saved_tensors
        row, column = roots.unsqueeze(-1), roots.unsqueeze(-2)
        divided = -reciprocal(row * column * (row + column))
        grad_64 = (grad + grad.mT).double() / 2
        inner = divided * (vectors.mT @ grad_64 @ vectors)
        if ctx.ridge > 0:
            # The mean eigenvalue follows all of them.
            mean = inner.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
            inner = inner + torch.diag_embed((ctx.ridge * mean).expand(inner.shape[:-1]))
        return (vectors @ inner @ vectors.mT).to(grad.dtype), None


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram_A: Tensor, gram_B: Tensor) -> Tensor:
        values_B, vectors_B = _eigh(gram_B)
        root = (vectors_B * values_B.sqrt().unsqueeze(-2)) @ vectors_B.mT
        values, vectors = _eigh_or_nan(root @ gram_A.double() @ root)
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


class _SoftInverseSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram_A: Tensor, gram_B: Tensor) -> Tensor:
        root, wide_B = _cholesky(gram_A), gram_B.double()
        values, vectors = _eigh_or_nan(root.mT @ wide_B @ root)
        d, V = values.clamp(min=0), root @ vectors
        W = wide_B @ V
        s, large = (1 + d).sqrt(), d[..., :1] > 1
        ctx.save_for_backward(gram_B, d, V, W)
        scale = torch.where(large, -1 / (d * s), 1 / (s * (s + 1)))
        identity = torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
        result: Tensor = torch.where(large.unsqueeze(-1), 0, identity) - (V * scale.unsqueeze(-2)) @ W.mT
        return result.to(gram_A.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gram_B, d, V, W = ctx.saved_tensors
        wide_B, g, large = gram_B.double(), grad.double(), d[..., :1, None] > 1
        row, column = (1 + d).sqrt().unsqueeze(-1), (1 + d).sqrt().unsqueeze(-2)
        both, product = row + column, row * column
        projected = V.mT @ g
        inner = projected @ W
        # Where all σ are large, by the divided differences of 1/s alone.
        plain = -inner / (product * both * torch.where(large, d.unsqueeze(-2), 1))
        # Elsewhere by those of h and, since h = 1/2 - d·k, of k = (s + 2)/(2·s·(s + 1)²).
        plus = product * (row + 1) * (column + 1)
        of_h = -(both + 1) / (plus * both)
        of_k = -(product * both + 2 * (both + 1).square()) / (2 * plus * (row + 1) * (column + 1) * both)
        h = torch.where(large, 0, 1 / (row * (row + 1)))
        k = torch.where(large, 0, (row + 2) / (2 * row * (row + 1).square()))
        grad_B = V @ (torch.where(large, plain, -of_h * inner) @ V.mT - h * projected)
        left = torch.where(large, plain / d.unsqueeze(-1), of_k * inner) @ W.mT + k * (projected @ wide_B)
        grad_A = W @ left - g @ (torch.where(large, 0, wide_B / 2) - W @ (k * W.mT))
        return _symmetric_part(grad_A).to(grad.dtype), _symmetric_part(grad_B).to(grad.dtype)


def _symmetric_part(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
