"""Positions in the base model: which module of which layer an adapter belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from hyperadapt.config.adapted_fields import AdaptedLayers, AdaptedModule
from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig

_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


@dataclass(frozen=True)
class Position:
    """One adapted module: its path as in ``named_modules()``, columns of A, rows of B, rank and scaling.

    Its kind, a convolution's kernel, an embedding's padding index and the number of experts are those of
    ``AdaptedModule``. Of experts the path is that of their parameter, and each has factors of its own.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float = 1.0
    kind: str = "Linear"
    kernel: tuple[int, ...] | None = None
    padding_idx: int | None = None
    experts: int | None = None

    @property
    def weights(self) -> int:
        """Number of matrices that are adapted here: one, or that of the experts."""
        return self.experts or 1

    @property
    def fan_in(self) -> int | None:
        """How many inputs act on an output at once, for the initial variance of A; None for all of them."""
        return 1 if self.kind == "Embedding" else None

    @property
    def layer_index(self) -> int | None:
        """Index of the transformer layer: the first number among the path's components; None outside of layers."""
        return layer_index(self.name)

    @property
    def module(self) -> str:
        """The path with the layer index as ``*``: the same for the same module of every layer."""
        return _INDEX.sub("*", self.name, count=1)


def saved_positions(positions: Sequence[Position]) -> list[dict[str, Any]]:
    """The positions as the field `adapted_modules` keeps them, which tells what layers share once."""
    blocks: list[AdaptedLayers] = []
    for index, members in groupby(positions, _repeated_index):
        block = AdaptedLayers(
            tuple(_adapted(member, index) for member in members), None if index is None else (index, index)
        )
        last = blocks[-1] if blocks else None
        if last and last.layers and block.layers and last.layers[1] + 1 == index and last.modules == block.modules:
            blocks[-1] = AdaptedLayers(block.modules, (last.layers[0], index))
        else:
            blocks.append(block)
    return [block.saved() for block in blocks]


def weight_count(config: HyperAdapterConfig) -> int:
    """How many matrices the positions have that ``positions_of`` gives."""
    return sum(
        len(block.indices) * sum(module.experts or 1 for module in block.modules) for block in config.adapted_layers
    )


def positions_of(config: HyperAdapterConfig) -> list[Position]:
    """The positions that a configuration tells of, in their order."""
    positions = []
    for block in config.adapted_layers:
        for index in block.indices:
            for module in block.modules:
                name = module.name if index is None else _with_index(module.name, index)
                r, scaling = config.rank_and_scaling(name)
                sizes = module.in_features, module.out_features
                position = Position(name, *sizes, r, scaling, module.kind, module.kernel, module.padding_idx)
                positions.append(replace(position, experts=module.experts))
    [(name, count)] = Counter(position.name for position in positions).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"adapted_modules names {shown(name)} more than once. The file is damaged: get it again.")
    return positions


def _repeated_index(position: Position) -> int | None:
    """The layer index, where the path can be made of it and of the module's again."""
    index = position.layer_index
    return index if index is not None and _with_index(position.module, index) == position.name else None


def _with_index(module: str, index: int) -> str:
    return re.sub(r"(?:^|(?<=\.))\*(?=\.|$)", str(index), module, count=1)


def _adapted(position: Position, index: int | None) -> AdaptedModule:
    return AdaptedModule(
        position.name if index is None else position.module,
        position.in_features,
        position.out_features,
        position.kind,
        position.kernel,
        position.padding_idx,
        position.experts,
    )


def layer_index(name: str) -> int | None:
    """As ``Position.layer_index``, of a path."""
    match = _INDEX.search(name)
    return int(match[0]) if match else None
