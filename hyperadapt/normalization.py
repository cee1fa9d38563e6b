"""Matrix normalisation of a generated update B·A as an r×r core S, so that the normalised update is B·S·A.

| method           | core S                    | at zero             | bound                |
|------------------|---------------------------|---------------------|----------------------|
| `none`           | I                         | identity            | none                 |
| `soft_frobenius` | (1 + f²/c²)^(-1/2) · I    | identity, smooth    | ‖ΔW‖_F < c           |
| `frobenius_clip` | 1/max(1, f/c) · I         | identity, kink at c | ‖ΔW‖_F ≤ c           |
| `frobenius`      | 1/f · I                   | undefined; 0 here   | ‖ΔW‖_F = 1           |

with f = ‖B·A‖_F and the bound c. Everything depends on A and B only through the Gram matrices
A·Aᵀ and Bᵀ·B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperadapt.config import BOUNDED_NORMALIZATIONS, NORMALIZATIONS


def normalize(
    lora_A: Tensor, lora_B: Tensor, method: str = "soft_frobenius", *, bound: float | Tensor | None = None
) -> Tensor:
    """Core S of the normalised update ``lora_B @ core @ lora_A``.

    Args:
        lora_A: Shape ``(..., r, in_features)``.
        lora_B: Shape ``(..., out_features, r)``, same leading dimensions.
        method: One of ``hyperadapt.config.NORMALIZATIONS``.
        bound: Bound on the Frobenius norm, a number or shape ``(...)``, in units of the weights; only and
            always for the bounded methods. A tensor's values are not checked.

    Returns:
        Shape ``(..., r, r)``, float32 (float64 for float64 factors).

    Raises:
        ValueError: If the shapes do not fit, the method is unknown, or the bound is missing, needless or
            not above 0.
    """
    matrices = lora_A.ndim >= 2 and lora_B.ndim >= 2
    if not matrices or lora_A.shape[:-2] != lora_B.shape[:-2] or lora_A.shape[-2] != lora_B.shape[-1]:
        raise ValueError(
            f"lora_A of shape {tuple(lora_A.shape)} and lora_B of shape {tuple(lora_B.shape)} do not fit: they must be "
            "(..., r, in_features) and (..., out_features, r)."
        )
    return core_from_grams(*gram_matrices(lora_A, lora_B), method, bound=bound)


def gram_matrices(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices A·Aᵀ and Bᵀ·B.

    Args:
        lora_A: Shape ``(..., r, in_features)``.
        lora_B: Shape ``(..., out_features, r)``.

    Returns:
        Both of shape ``(..., r, r)``, computed in float32 (float64 for float64 factors).
    """
    if lora_A.dtype != torch.float64:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    return lora_A @ lora_A.mT, lora_B.mT @ lora_B


def core_from_grams(gram_A: Tensor, gram_B: Tensor, method: str, *, bound: float | Tensor | None = None) -> Tensor:  # noqa: DOC502
    """Core S from the Gram matrices of the factors.

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.
        method: One of ``hyperadapt.config.NORMALIZATIONS``.
        bound: As in ``normalize``.

    Returns:
        Shape ``(..., r, r)``, same dtype.

    Raises:
        ValueError: If the shapes differ, the method is unknown, or the bound is missing, needless or not
            above 0.
    """
    _check_method(method, bound)
    f_squared = frobenius_norm_squared(gram_A, gram_B)
    if method == "soft_frobenius":
        scale = (1 + f_squared / _squared_bound(bound, f_squared)).rsqrt()
    elif method == "frobenius_clip":
        c_squared = _squared_bound(bound, f_squared)
        clipped = f_squared > c_squared
        scale = torch.where(clipped, _inverse_norm_where(clipped, f_squared, 1.0) * c_squared.sqrt(), 1.0)
    elif method == "frobenius":
        scale = _inverse_norm_where(f_squared > 0, f_squared, 0.0)
    else:
        scale = torch.ones_like(f_squared)
    return scale[..., None, None] * torch.eye(gram_A.shape[-1], dtype=gram_A.dtype, device=gram_A.device)


def frobenius_norm_squared(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Squared Frobenius norm of B·A from the factors' Gram matrices.

    Never forms the product: ‖B·A‖² = ⟨A·Aᵀ, Bᵀ·B⟩. Rounding can make the sum of a nearly
    cancelling product negative, so it is clamped at zero.

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.

    Returns:
        Shape ``(...)``, in squared units of the weights.

    Raises:
        ValueError: If the two shapes differ.
    """
    if gram_A.shape != gram_B.shape:
        raise ValueError(f"gram_A has shape {tuple(gram_A.shape)} but gram_B has shape {tuple(gram_B.shape)}.")
    return (gram_A * gram_B).sum(dim=(-2, -1)).clamp(min=0)


def _inverse_norm_where(condition: Tensor, f_squared: Tensor, otherwise: float) -> Tensor:
    """1/f where the condition holds; the inner `where` keeps the gradient elsewhere 0 instead of 0·inf."""
    return torch.where(condition, torch.where(condition, f_squared, 1.0).rsqrt(), otherwise)


def _squared_bound(bound: float | Tensor | None, like: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=like.dtype, device=like.device).square()


def _check_method(method: str, bound: float | Tensor | None) -> None:
    if method not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalization {method!r}. Choose one of {', '.join(map(repr, NORMALIZATIONS))}.")
    bounded = method in BOUNDED_NORMALIZATIONS
    if bounded and bound is None:
        raise ValueError(f"normalization {method!r} needs a bound on the Frobenius norm; pass bound=.")
    if not bounded and bound is not None:
        raise ValueError(f"bound={bound!r} has no effect with normalization {method!r}; drop it.")
    if isinstance(bound, int | float) and not bound > 0:
        raise ValueError(f"bound={bound!r} must be above 0.")
