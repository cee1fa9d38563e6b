"""What is known of a normalisation beside its formula, and the options that normalisations take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Default bound of up to so many adapted positions; a smaller one trains at higher learning rates, a larger one leaves
# more room. The squares of the bounds of more positions add up to no more than theirs (DECISIONS.md).
BOUND, BOUND_POSITIONS = 0.2, 6
# Default number of optimizer steps over which a bound grows, where B starts at zero (DECISIONS.md).
WARMUP = 30


def default_bound(positions: int) -> float:
    """The bound of each of so many adapted positions, in units of the base weight's norm."""
    return BOUND * min(1.0, math.sqrt(BOUND_POSITIONS / positions))


@dataclass(frozen=True)
class Option:
    """What a configuration may give for an option: one of `choices`, or else a number above 0 of the given kind."""

    kind: type
    choices: tuple[Any, ...] = ()

    @property
    def rule(self) -> str:
        """What a value must be, in words."""
        if not self.choices:
            return "above 0"
        *others, last = map(repr, self.choices)
        return f"{', '.join(others)} or {last}"

    def holds(self, value: Any) -> bool:
        """Whether a value keeps the rule."""
        return value in self.choices if self.choices else bool(value > 0)


# In a configuration they are called normalization_<option>.
OPTIONS = {
    "bound": Option(float),
    "ridge": Option(float),
    "factors": Option(str, choices=("both", "A")),
    "iterations": Option(int),
    "temperature": Option(float),
    "warmup": Option(int),
}


@dataclass(frozen=True)
class Normalization:
    """One normalisation: what the configuration, the network and ``MatrixNorm`` need to know of it.

    Args:
        core: The formula: from the Gram matrices and all of its options to the core; None if that is the identity.
        options: Its options that have a default, all in ``OPTIONS``.
        needs: Its options that have none: ``"bound"`` makes it a bounded normalisation, the identity near zero;
            ``"logits"`` are generated.
        largest_norm: Of a unit normalisation, which is undefined at zero: the largest Frobenius norm of an update
            of rank r.
        without_gain: Values of options with which a unit normalisation is defined at B = 0, and takes no gain.
        bounds_singular_values: Whether the bound is on each singular value, as bound/√r, and by that on the norm.
        learns_bound: Whether each position learns a bound of its own, below the given one.
        kernel: The kernel that computes the same on a GPU: ``"scale"`` from the factors, others from Gram matrices
            (``core_triton``); None for the formula alone.
    """

    core: Callable[..., Tensor] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    largest_norm: Callable[[int], float] | None = None
    without_gain: Mapping[str, Any] = field(default_factory=dict)
    bounds_singular_values: bool = False
    learns_bound: bool = False
    kernel: str | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether the norm is bounded, and the update unchanged near zero."""
        return "bound" in self.needs

    @property
    def is_unit(self) -> bool:
        """Whether the norm is that of a unit, and undefined at zero."""
        return self.largest_norm is not None

    def needs_gain(self, given: Mapping[str, Any]) -> bool:
        """Whether a gain must follow, with these values of the options."""
        return self.is_unit and not any(given.get(name) == value for name, value in self.without_gain.items())

    def config_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options, with defaults, of a configuration that gives these values: also of a bound, and of a gain's.

        The bound's is None: it is known with the number of positions.
        """
        has_bound = self.is_bounded or self.needs_gain(given)
        bound = {"bound": None} if has_bound else {}
        return {**self.options, **bound, **({"warmup": WARMUP} if self.is_bounded else {})}
