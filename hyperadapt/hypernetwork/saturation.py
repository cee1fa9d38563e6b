"""Which updates sit at their bound, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hyperadapt.hypernetwork.positions import layer_index

# Share of its bound from which an update counts as saturated. Under the soft bounds x/√(1 + x²) the raw update x is
# then twice the bound, and a twelfth of what a step adds to it arrives.
SATURATED = 0.9
REMEDY = (
    "They would be larger without it. If the loss jumps or the accuracy is below what you expect, the learning rate is "
    "likely too high: lower it. If it is a rate at which a LoRA trains, raise normalization_bound."
)
_SHOWN_LAYERS = 3


@dataclass(frozen=True)
class Saturation:
    """Which share of the updates, one for each task at each position, are at their bound: at 90% of it or above.

    Args:
        share: Of all of them, in [0, 1].
        layers: Of those of each layer, by ``"layer_<index>"``; ``"no_layer"`` are the positions outside of layers.
    """

    share: float
    layers: Mapping[str, float]

    @classmethod
    def of(cls, positions: Mapping[str, float]) -> Saturation:
        """From the shares by position name, one of which at least there must be.

        Args:
            positions: A position's name -> share of its updates that are at their bound.

        Returns:
            Their means, overall and by layer.
        """
        layers: dict[str, list[float]] = {}
        for name, share in positions.items():
            index = layer_index(name)
            layers.setdefault("no_layer" if index is None else f"layer_{index}", []).append(share)
        return cls(_mean(positions.values()), {layer: _mean(shares) for layer, shares in layers.items()})

    @property
    def is_high(self) -> bool:
        """Whether most of all updates are at their bound."""
        return self.share > 0.5

    def __str__(self) -> str:
        order = sorted(self.layers, key=lambda layer: -self.layers[layer])[:_SHOWN_LAYERS]
        # Where all layers are alike, none stands out.
        above = [f"{name} ({self.layers[name]:.0%})" for name in order if self.layers[name] > self.share + 0.005]
        most = f", most in {', '.join(above)}" if above else ""
        return f"{self.share:.0%} of the updates are at their bound ({SATURATED:.0%} of it or more){most}"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)
