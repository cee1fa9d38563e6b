"""Positions in the base model: which module of which layer an adapter belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """One adapted module: its path as in ``named_modules()``, columns of A, rows of B, rank and scaling.

    ``fan_in`` is how many inputs act on an output at once, for the initial variance of A; None for all of them.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float = 1.0
    fan_in: int | None = None

    @property
    def layer_index(self) -> int | None:
        """Index of the transformer layer: the first number among the path's components; None outside of layers."""
        return layer_index(self.name)

    @property
    def module(self) -> str:
        """The path with the layer index as ``*``: the same for the same module of every layer."""
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self.name, count=1)


def layer_index(name: str) -> int | None:
    """As ``Position.layer_index``, of a path."""
    match = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(match.group(1)) if match else None
