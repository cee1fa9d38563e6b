"""The normalisations, and their options in a configuration."""

from __future__ import annotations

from typing import Any

# Default bound; a smaller one trains at higher learning rates, a larger one leaves more room (DECISIONS.md).
BOUND = 0.2
# Of each normalisation, the options it takes and their defaults; in the config they are called normalization_<option>.
NORMALIZATION_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "soft_frobenius": {"bound": BOUND},
    "frobenius_clip": {"bound": BOUND},
    "adaptive": {"bound": BOUND},
    "frobenius": {},
    "spectral": {},
    "schatten": {"order": 8},
    "polar": {"ridge": 1e-5},
    "whitening": {"ridge": 1e-5, "factors": "both"},
    "weight_norm": {},
    "sinkhorn": {"iterations": 20, "temperature": 1.0},
}
NORMALIZATIONS = tuple(NORMALIZATION_OPTIONS)
BOUNDED_NORMALIZATIONS = tuple(name for name, options in NORMALIZATION_OPTIONS.items() if "bound" in options)
UNIT_NORMALIZATIONS = tuple(name for name in NORMALIZATIONS if name not in ("none", *BOUNDED_NORMALIZATIONS))


def options_of(method: str, factors: str | None = None) -> dict[str, Any]:
    """A method's options with their defaults; with a gain also the gain's bound.

    Args:
        method: One of ``NORMALIZATIONS``.
        factors: Which factors whitening whitens; that of A alone has no gain.

    Returns:
        Name without the prefix ``normalization_`` -> default.
    """
    has_gain = method in UNIT_NORMALIZATIONS and factors != "A"
    return NORMALIZATION_OPTIONS[method] | ({"bound": BOUND} if has_gain else {})
