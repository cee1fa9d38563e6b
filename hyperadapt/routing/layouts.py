"""How the rows of a batch lie in what modules get.

Sizes cannot tell: a first dimension as long as the batch may be of tokens, of images or of a table that all rows share.
What grows from one row to two, and holds for both what each has alone, is known to be of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor

# The model makes these where they are missing; their first dimension need not be of rows.
_CAN_BE_MISSING = ("past_key_values", "cache_params", "mems", "cache_position", "position_ids", "rope_deltas", "state")
_SWITCHES = (bool, str)


@dataclass(frozen=True)
class Layout:
    """How rows lie in the first dimension of a module's input.

    Args:
        sizes: How many elements a row has there.
        in_blocks: Whether all rows come once before any comes again, as in [conditional; unconditional].
        lengths: Names of inputs whose second dimension is that number, whatever it is.
        is_constant: Whether inputs of other lengths have the same number.
        item_token: The elements are of images, and a row has a share of them as large as its share of these ids.
    """

    sizes: frozenset[int] = frozenset()
    in_blocks: bool = False
    lengths: frozenset[str] = frozenset()
    is_constant: bool = False
    item_token: int | None = None

    @property
    def is_general(self) -> bool:
        """Whether it tells the rows of inputs of other sizes, too."""
        return self.is_constant or bool(self.lengths) or self.item_token is not None


@dataclass
class Call:
    """A call of the base model, or of a part of it by itself.

    Args:
        path: Name of that part; empty for the base model.
        inputs: Its arguments by name, or by place.
        main: Name of the one that tells the rows.
        num_rows: Their number.
        layouts: By position name, or why rows cannot be told apart there.
        problem: Why nothing is known of the others.
    """

    path: str
    inputs: dict[str, Any]
    main: str
    num_rows: int
    layouts: Mapping[str, Layout | str] = field(default_factory=dict)
    problem: str = ""

    @property
    def repeatable(self) -> dict[str, Any]:
        """The inputs without a cache and what belongs to it, which the model makes itself."""
        kept = {name: value for name, value in self.inputs.items() if value is not None and name not in _CAN_BE_MISSING}
        mask, ids = kept.get("attention_mask"), self.inputs.get("input_ids")
        is_of_tokens = isinstance(mask, Tensor) and mask.ndim == 2
        if mask is not None and not (is_of_tokens and (ids is None or mask.shape[1] == ids.shape[1])):
            # One that covers the cache, too.
            del kept["attention_mask"]
        return kept

    @property
    def kind(self) -> tuple[str, frozenset[tuple[str, str]]]:
        """Which inputs are given, and what switches say: they decide which modules are called with what."""
        given = self.repeatable.items()
        return self.path, frozenset((name, str(value) if isinstance(value, _SWITCHES) else "") for name, value in given)

    @property
    def sizes(self) -> frozenset[tuple[Any, ...]]:
        """Sizes of a row's inputs."""
        return frozenset((name, *value.shape[1:]) for name, value in self.inputs.items() if isinstance(value, Tensor))

    def contains(self, path: str) -> bool:
        """Whether a call of a part is inside of this one."""
        return path != self.path and (not self.path or path.startswith(f"{self.path}."))

    def has_rows(self, value: Any) -> TypeGuard[Tensor]:
        """Whether an input is a tensor with a row for each of the batch."""
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.num_rows

    def length(self, name: str) -> int | None:
        """Second dimension of an input that has rows."""
        value = self.inputs.get(name)
        return value.shape[1] if self.has_rows(value) and value.ndim > 1 else None

    def count(self, token: int) -> Tensor | None:
        """How many of these ids each row has, int64 of shape ``(num_rows,)``; None where the ids are not known."""
        ids = self.inputs.get("input_ids")
        return (ids == token).flatten(1).sum(dim=1) if self.has_rows(ids) else None

    def elements(self, rows: Tensor, position: str, size: int) -> Tensor:
        """What belongs to each row, shape ``(num_rows,)``, for each element that a module gets, shape ``(size,)``."""
        layout = self.layouts.get(position, "it is not called when the model runs on single rows")
        if self.problem:
            layout = self.problem
        if isinstance(layout, str):
            raise ValueError(layout)
        if layout.item_token is not None:
            return rows.repeat_interleave(self._shares(layout.item_token, size), output_size=size)
        # Not divmod, which the sizes of an exported program do not have.
        per_row = size // self.num_rows
        if per_row * self.num_rows != size or not self._is_known(layout, per_row):
            raise ValueError(f"{size} elements are not what {self.num_rows} rows have there")
        if per_row == 1:
            return rows
        return rows.repeat(per_row) if layout.in_blocks else rows.repeat_interleave(per_row)

    def _is_known(self, layout: Layout, per_row: int) -> bool:
        if layout.is_constant or not layout.is_general:
            return any(per_row == size for size in layout.sizes)
        return any(self.length(name) == per_row for name in layout.lengths)

    def _shares(self, token: int, size: int) -> Tensor:
        """How many of the elements each row has."""
        counts = self.count(token)
        if counts is None:
            raise ValueError("without input_ids it is not known how many images a row has")
        shares, total = counts * size, int(counts.sum())
        if not total or (shares % total).any():
            raise ValueError(f"{size} elements cannot be dealt out to rows with {counts.tolist()} image tokens")
        return shares // total


class Layouts:
    """The layouts learned so far; plain data that is copied and pickled with its router."""

    def __init__(self) -> None:
        # By kind of call, and by the sizes of a row's inputs where these matter.
        self._learned: dict[tuple[str, frozenset[Any]], dict[frozenset[Any] | None, dict[str, Layout | str]]] = {}

    def find(self, call: Call) -> Mapping[str, Layout | str] | None:
        """The layouts that hold in a call; None if they have to be learned."""
        learned = self._learned.get(call.kind, {})
        # The sizes of an exported program cannot be looked up.
        return learned[None] if None in learned else learned.get(call.sizes) if learned else None

    def clear(self) -> None:
        """Forget them all."""
        self._learned.clear()

    def keep(self, call: Call, layouts: dict[str, Layout | str]) -> None:
        """Remember what was learned in a call."""
        is_general = all(isinstance(layout, str) or layout.is_general for layout in layouts.values())
        self._learned.setdefault(call.kind, {})[None if is_general else call.sizes] = layouts
