"""Every normalisation as a core S, an r×r matrix computed from the Gram matrices of the factors.

Each function takes ``gram_A = A·Aᵀ`` and ``gram_B = Bᵀ·B`` of shape ``(..., r, r)``, float32 or float64, and its own
options as keywords, and returns S of the same shape and dtype, so that the normalised update is B·S·A; or, where S is a
multiple of the identity, the factor, of shape ``(..., 1, 1)``. All are finite, with finite gradients, at zero, at
rank-deficient and at repeated spectra.

One more normalisation is a function here, and its record in ``METHODS``; a kernel for it may come later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperadapt.normalization.matrix_functions import (
    inverse_sqrt,
    reciprocal,
    sinkhorn,
    soft_inverse_sqrt,
    spectral_norm,
)
from hyperadapt.normalization.methods import Normalization

# Of ‖G_A‖·‖G_B‖: the smallest that keeps updates of any size, rank and width below a bound (DECISIONS.md).
ROUNDING = {torch.float32: 1e-8, torch.float64: 1e-15}


def frobenius_norm_squared(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Squared Frobenius norm ⟨A·Aᵀ, Bᵀ·B⟩ of B·A, shape ``(...)``, from Gram matrices of shape ``(..., r, r)``."""
    if gram_A.shape != gram_B.shape:
        raise ValueError(f"gram_A has shape {tuple(gram_A.shape)} but gram_B has shape {tuple(gram_B.shape)}.")
    # Rounding can make the sum of a nearly cancelling product negative.
    return (gram_A * gram_B).sum(dim=(-2, -1)).clamp(min=0)


def soft_scale(f_squared: Tensor, bound: float | Tensor) -> Tensor:
    """Scale (1 + f²/c²)^(-1/2) of an update of norm f, shape ``(...)``: 1 near zero, and it keeps f below c."""
    return (1 + f_squared / _squared(bound, f_squared)).rsqrt()


def learned_bound(bound: float | Tensor, logit: Tensor) -> Tensor:
    """Bound in (0, `bound`) of a learned logit, shape ``(...)``: 88% of `bound` where that is 0, as at the start."""
    # Below e^-10 of `bound` nothing is left of an update; without a limit the square would be 0 in a diverging run.
    return bound * (2 + logit).clamp(min=-10).sigmoid()


def _soft_frobenius(gram_A: Tensor, gram_B: Tensor, *, bound: float | Tensor) -> Tensor:
    return soft_scale(frobenius_norm_squared(gram_A, gram_B), bound)[..., None, None]


def _soft_polar(gram_A: Tensor, gram_B: Tensor, *, bound: float | Tensor) -> Tensor:
    # With r singular values below bound/√r, the Frobenius norm is below the bound.
    c_squared = _squared(bound, gram_A)[..., None, None] / gram_A.shape[-1]
    # In place of 1, so that a direction that is lost has a core near those of others, and not one beside which they are
    # lost, or one that is taken from what rounding left of it.
    shift = (_rounding(gram_A, gram_B) / c_squared.detach()).clamp(min=1)
    core = soft_inverse_sqrt(gram_A, gram_B / (c_squared * shift))
    return core * shift.rsqrt().to(core.dtype)


def _rounding(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """What rounding may have made of an eigenvalue zero of G_A·G_B, shape ``(..., 1, 1)``, float64, no gradient."""
    size_A, size_B = (torch.linalg.matrix_norm(gram.detach().double(), keepdim=True) for gram in (gram_A, gram_B))
    rounding: Tensor = ROUNDING[gram_A.dtype] * size_A * size_B
    return rounding


def _frobenius(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    return _inverse_root(frobenius_norm_squared(gram_A, gram_B))[..., None, None]


def _spectral(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    return reciprocal(spectral_norm(gram_A, gram_B))[..., None, None]


def _whitening(gram_A: Tensor, gram_B: Tensor, *, ridge: float, factors: str) -> Tensor:
    core = inverse_sqrt(gram_A, ridge)
    return core if factors == "A" else inverse_sqrt(gram_B, ridge) @ core


def _weight_norm(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    return torch.diag_embed(_inverse_lengths(gram_A) * _inverse_lengths(gram_B))


def _sinkhorn(gram_A: Tensor, gram_B: Tensor, *, logits: Tensor, iterations: int, temperature: float) -> Tensor:
    mixing = sinkhorn(logits.to(gram_A.dtype), iterations=iterations, temperature=temperature)
    return _inverse_lengths(gram_B).unsqueeze(-1) * mixing * _inverse_lengths(gram_A).unsqueeze(-2)


def _squared(bound: float | Tensor, like: Tensor) -> Tensor:
    # A number is filled in on the device; copying it there would make the host wait.
    return (bound.to(like) if isinstance(bound, Tensor) else like.new_full((), bound)).square()


def _inverse_root(x: Tensor) -> Tensor:
    """1/√x, and 0 where x is 0 or subnormal; see ``reciprocal`` for the two steps."""
    is_small = x < torch.finfo(x.dtype).tiny
    safe = torch.where(is_small, 1, x)
    scale = safe.detach()
    return torch.where(is_small, 0, (safe / scale).rsqrt() * scale.rsqrt())


def _inverse_lengths(gram: Tensor) -> Tensor:
    """1 over the lengths of the rows of A (columns of B), 0 for zero rows."""
    return _inverse_root(gram.diagonal(dim1=-2, dim2=-1))


# Largest norms: Σσᵢ² ≤ r where σ₁ ≤ 1. A sum of r matrices of norm 1, or a mean of such sums, may reach r.
METHODS: dict[str, Normalization] = {
    "none": Normalization(None),
    "soft_frobenius": Normalization(_soft_frobenius, needs=("bound",), kernel="scale"),
    "soft_polar": Normalization(_soft_polar, needs=("bound",), bounds_singular_values=True, kernel="soft_polar"),
    "adaptive": Normalization(
        _soft_polar, needs=("bound",), bounds_singular_values=True, learns_bound=True, kernel="soft_polar"
    ),
    "frobenius": Normalization(_frobenius, largest_norm=lambda r: 1.0, kernel="scale"),
    "spectral": Normalization(_spectral, largest_norm=math.sqrt, kernel="spectral"),
    "whitening": Normalization(
        _whitening,
        {"ridge": 1e-5, "factors": "both"},
        largest_norm=math.sqrt,
        without_gain={"factors": "A"},
        kernel="whitening",
    ),
    "weight_norm": Normalization(_weight_norm, largest_norm=float, kernel="weight_norm"),
    "sinkhorn": Normalization(
        _sinkhorn, {"iterations": 20, "temperature": 1.0}, needs=("logits",), largest_norm=float, kernel="sinkhorn"
    ),
}
NORMALIZATIONS = tuple(METHODS)
BOUNDED_NORMALIZATIONS = tuple(name for name, method in METHODS.items() if method.is_bounded)
UNIT_NORMALIZATIONS = tuple(name for name, method in METHODS.items() if method.is_unit)
