"""Matrix normalisation of a generated update B·A as an r×r core S, so that the normalised update is B·S·A.

Everything depends on A and B only through the Gram matrices A·Aᵀ and Bᵀ·B. ``docs/normalization.md`` has the table of
all methods: core, behaviour at B = 0, bound and cost. Those undefined at B = 0 need non-zero heads and a gain.

Sources: `weight_norm` Salimans and Kingma 2016; `spectral` Miyato et al. 2018; `sinkhorn` Sinkhorn and Knopp 1967 as in
arXiv 2512.24880; `whitening` is ZCA without centring; the cores' common form is this project's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperadapt.normalization.formulas import CORES
from hyperadapt.normalization.gram import grams
from hyperadapt.normalization.methods import NORMALIZATION_OPTIONS, NORMALIZATIONS

# Options that no config can hold, because they are tensors: per position or generated.
_TENSOR_OPTIONS = {"adaptive": ("strength",), "sinkhorn": ("logits",)}


def normalize(
    lora_A: Tensor,
    lora_B: Tensor,
    method: str = "soft_frobenius",
    *,
    bound: float | Tensor | None = None,
    strength: float | Tensor | None = None,
    ridge: float | None = None,
    factors: str | None = None,
    order: int | None = None,
    logits: Tensor | None = None,
    iterations: int | None = None,
    temperature: float | None = None,
) -> Tensor:  # noqa: DOC502
    """Core S of the normalised update ``lora_B @ core @ lora_A``.

    Args:
        lora_A: Shape ``(..., r, in_features)``.
        lora_B: Shape ``(..., out_features, r)``, same leading dimensions.
        method: One of ``hyperadapt.normalization.NORMALIZATIONS``; ``docs/normalization.md`` says what each does.
        bound: Bound on the Frobenius norm, a number or shape ``(...)``, in units of the weights; always for
            the bounded methods. A tensor's values are not checked.
        strength: Strength α in [0, 1] of ``"adaptive"``, a number or shape ``(...)``, dimensionless; always.
        ridge: Ridge of ``"polar"`` and ``"whitening"``, relative to the mean eigenvalue; 1e-5 by default.
        factors: ``"both"`` (default) or ``"A"``: which factors ``"whitening"`` whitens.
        order: Order p of ``"schatten"``, a power of 2; 8 by default.
        logits: Mixing logits of ``"sinkhorn"``, shape ``(..., r, r)``; always.
        iterations: Iterations of ``"sinkhorn"``; 20 by default.
        temperature: Temperature of ``"sinkhorn"``; 1 by default.

    Returns:
        Shape ``(..., r, r)``, float32 (float64 for float64 factors).

    Raises:
        ValueError: If the shapes do not fit, the method is unknown, or an option is missing, needless or out of
            range.
    """
    if min(lora_A.ndim, lora_B.ndim) < 2 or (*lora_A.shape[:-2], lora_A.shape[-2]) != (
        *lora_B.shape[:-2],
        lora_B.shape[-1],
    ):
        raise ValueError(
            f"lora_A of shape {tuple(lora_A.shape)} and lora_B of shape {tuple(lora_B.shape)} do not fit: they must be "
            "(..., r, in_features) and (..., out_features, r)."
        )
    options = {
        "bound": bound,
        "strength": strength,
        "ridge": ridge,
        "factors": factors,
        "order": order,
        "logits": logits,
        "iterations": iterations,
        "temperature": temperature,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    core = core_from_grams(*gram_matrices(lora_A, lora_B), method, **given)
    r = lora_A.shape[-2]
    return core if core.shape[-1] == r else core * torch.eye(r, dtype=core.dtype, device=core.device)


def gram_matrices(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices A·Aᵀ and Bᵀ·B.

    Args:
        lora_A: Shape ``(..., r, in_features)``.
        lora_B: Shape ``(..., out_features, r)``.

    Returns:
        Both of shape ``(..., r, r)``, computed in float32 (float64 for float64 factors).
    """
    batch, r = lora_A.shape[:-2], lora_A.shape[-2]
    if lora_A.dtype != lora_B.dtype:
        wide = torch.promote_types(lora_A.dtype, lora_B.dtype)
        lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    gram_A, gram_B = grams([lora_A.reshape(-1, *lora_A.shape[-2:]), lora_B.mT.reshape(-1, r, lora_B.shape[-2])])
    return gram_A.reshape(*batch, r, r), gram_B.reshape(*batch, r, r)


def core_from_grams(gram_A: Tensor, gram_B: Tensor, method: str, **options: Any) -> Tensor:  # noqa: DOC502
    """Core S from the Gram matrices of the factors.

    Args:
        gram_A: A·Aᵀ, shape ``(..., r, r)``, float32 or float64.
        gram_B: Bᵀ·B, same shape and dtype.
        method: One of ``hyperadapt.normalization.methods.NORMALIZATIONS``.
        **options: The method's options, as in ``normalize``.

    Returns:
        Shape ``(..., r, r)``, or ``(..., 1, 1)`` of a method whose core is a multiple of the identity; same dtype.

    Raises:
        ValueError: If the shapes differ, the method is unknown, or an option is missing, needless or out of range.
    """
    _check_options(method, options)
    if "logits" in options and options["logits"].shape[-2:] != gram_A.shape[-2:]:
        raise ValueError(
            f"logits of shape {tuple(options['logits'].shape)} do not fit: with rank {gram_A.shape[-1]} they must be "
            f"(..., {gram_A.shape[-1]}, {gram_A.shape[-1]})."
        )
    return CORES[method](gram_A, gram_B, **options)


def _check_options(method: str, options: dict[str, Any]) -> None:
    if method not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalization {method!r}. Choose one of {', '.join(map(repr, NORMALIZATIONS))}.")
    tensors = _TENSOR_OPTIONS.get(method, ())
    known = (*NORMALIZATION_OPTIONS[method], *tensors)
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"{name}={value!r} has no effect with normalization {method!r}, which takes "
                f"{', '.join(known) or 'no options'}; drop it."
            )
        if name in ("bound", "ridge", "temperature", "iterations") and not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0.")
        if name == "strength" and not isinstance(value, Tensor) and not 0 <= value <= 1:
            raise ValueError(f"strength={value!r} must be in [0, 1].")
        if name == "iterations" and not isinstance(value, int):
            raise ValueError(f"iterations={value!r} must be an integer.")
    # A bound has a default in the config, where it is in units of the base weight, but none here.
    for name in ("bound", *tensors):
        if name in known and name not in options:
            raise ValueError(f"normalization {method!r} needs {name}=; see the documentation of normalize.")
    if options.get("order", 8) not in (2, 4, 8, 16, 32):
        raise ValueError(f"order={options['order']!r} must be 2, 4, 8, 16 or 32.")
    if options.get("factors", "A") not in ("both", "A"):
        raise ValueError(f"factors={options['factors']!r} must be 'both' or 'A'.")
