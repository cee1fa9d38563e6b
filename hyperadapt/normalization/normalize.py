"""Matrix normalisation of a generated update B·A as an r×r core S, so that the normalised update is B·S·A.

Everything depends on A and B only through the Gram matrices A·Aᵀ and Bᵀ·B. ``docs/normalization.md`` has the table of
all methods: core, behaviour at B = 0, bound and cost. Those undefined at B = 0 need non-zero heads and a gain.

Sources: `weight_norm` Salimans and Kingma 2016; `spectral` Miyato et al. 2018; `sinkhorn` Sinkhorn and Knopp 1967 as in
arXiv 2512.24880; `whitening` is ZCA without centring; the cores' common form is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadapt.normalization.cores import cores
from hyperadapt.normalization.formulas import METHODS
from hyperadapt.normalization.methods import OPTIONS, Normalization
from hyperadapt.normalization.precision import own_dtype


def normalize(
    lora_A: Tensor,
    lora_B: Tensor,
    method: str = "soft_polar",
    *,
    bound: float | Tensor | None = None,
    ridge: float | None = None,
    factors: str | None = None,
    logits: Tensor | None = None,
    iterations: int | None = None,
    temperature: float | None = None,
) -> Tensor:
    """Core S of the normalised update ``lora_B @ core @ lora_A``.

    Args:
        lora_A: Shape ``(..., r, in_features)``.
        lora_B: Shape ``(..., out_features, r)``, same leading dimensions.
        method: One of ``hyperadapt.normalization.NORMALIZATIONS``; ``docs/normalization.md`` says what each does.
        bound: Bound on the Frobenius norm, a number or shape ``(...)``, in units of the weights; always for
            the bounded methods. ``"soft_polar"`` keeps each singular value below bound/√r; ``"adaptive"`` is the same
            here, since a bound that is learned comes from outside, as in ``hyperadapt.nn.MatrixNorm``. A tensor's
            values are not checked.
        ridge: Ridge of ``"whitening"``, relative to the mean eigenvalue; 1e-5 by default.
        factors: ``"both"`` (default) or ``"A"``: which factors ``"whitening"`` whitens.
        logits: Mixing logits of ``"sinkhorn"``, shape ``(..., r, r)``; always.
        iterations: Iterations of ``"sinkhorn"``; 20 by default.
        temperature: Temperature of ``"sinkhorn"``; 1 by default.

    Returns:
        Shape ``(..., r, r)``, float32 (float64 for float64 factors), also under autocast.

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
        "ridge": ridge,
        "factors": factors,
        "logits": logits,
        "iterations": iterations,
        "temperature": temperature,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    record, r = checked_method(method), lora_A.shape[-2]
    check_options(method, given, (*record.options, *record.needs))
    # A bound has a default in the config, where it is in units of the base weight, but none here.
    for name in record.needs:
        if name not in given:
            raise ValueError(f"normalization {method!r} needs {name}=; see the documentation of normalize.")
    if logits is not None and logits.shape[-2:] != (r, r):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit: with rank {r} they must be (..., {r}, {r})."
        )
    return full_core(lora_A, lora_B, record, given)


def full_core(lora_A: Tensor, lora_B: Tensor, method: Normalization, options: Mapping[str, Any]) -> Tensor:
    """Core S of checked options, shape ``(..., r, r)``, float32 or float64."""
    batch, r = lora_A.shape[:-2], lora_A.shape[-2]
    if lora_A.dtype != lora_B.dtype:
        wide = torch.promote_types(lora_A.dtype, lora_B.dtype)
        lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    flat = dict(options)
    if isinstance(bound := options.get("bound"), Tensor):
        flat["bound"] = bound.expand(batch).reshape(-1, 1)
    if "logits" in options:
        flat["logits"] = options["logits"].expand(*batch, r, r).reshape(-1, 1, r, r)
    rows_A, rows_B = lora_A.reshape(-1, 1, *lora_A.shape[-2:]), lora_B.mT.reshape(-1, 1, r, lora_B.shape[-2])
    with own_dtype(lora_A.device):
        core = cores([rows_A], [rows_B], method, flat)
    core = core.reshape(*batch, *core.shape[-2:])
    return core if core.shape[-1] == r else core * torch.eye(r, dtype=core.dtype, device=core.device)


def checked_method(name: str) -> Normalization:
    """The normalisation of a name."""
    if name not in METHODS:
        raise ValueError(f"Unknown normalization {name!r}. Choose one of {', '.join(map(repr, METHODS))}.")
    return METHODS[name]


def check_options(method: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check the options of a call against those that it can take; the values of a tensor are not checked."""
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"{name}={value!r} has no effect with normalization {method!r}, which takes "
                f"{', '.join(known) or 'no options'}; drop it."
            )
        if name in OPTIONS:
            _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    option = OPTIONS[name]
    if option.kind is float and isinstance(value, Tensor):
        return
    if not option.holds(value):
        raise ValueError(f"{name}={value!r} must be {option.rule}.")
    if option.kind is int and not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer.")
