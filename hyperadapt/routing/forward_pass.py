"""One forward pass as data: the factors generated for it, and which task each row of an activation uses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.positions import Position


@dataclass(frozen=True)
class Routed:
    """Generated factors by position name, and which of them each row of the batch uses.

    Args:
        factors: By position name, of several tasks.
        rows: The task of each row, int64 of shape ``(batch,)``; None if there is one for all.
        is_one_to_one: Whether each row has a task of its own, in order.
    """

    factors: dict[str, Factors]
    rows: Tensor | None
    is_one_to_one: bool = False


@dataclass
class ForwardPass:
    """One forward (or generate) call.

    Args:
        routed: Factors and rows by adapter name.
        num_rows: Number of rows that tasks were given for; None if one task is meant for all, or once it
            was compared with the batch.
        batch_size: Rows of the base model's latest input, beams included; None if unknown.
        length: Tokens per row of that input; None if unknown.
    """

    routed: dict[str, Routed]
    num_rows: int | None = None
    batch_size: int | None = None
    length: int | None = None

    def observe(self, model_input: Tensor) -> None:
        """Note the base model's input ``(batch, ...)``; the first must have a row per task, later ones may be beams."""
        self.batch_size = len(model_input)
        # Token ids or embeddings; other inputs have no tokens in their second dimension.
        self.length = model_input.shape[1] if model_input.ndim in (2, 3) else None
        if self.num_rows is not None and self.num_rows != self.batch_size:
            raise ValueError(
                f"Got tasks for {self.num_rows} rows, but the batch has {self.batch_size}. Pass one task per row, or "
                "one name for all rows."
            )
        self.num_rows = None

    def rows_of(self, rows: Tensor, x: Tensor, position: Position) -> Tensor:
        """The task of each element of an activation's first dimension, shape ``(len(x),)``.

        That dimension is the batch, the batch with each row repeated (beams, windows), or the batch's flattened tokens.
        """
        size = len(x)
        if not self._keeps_rows(len(rows), x, position):
            raise ValueError(
                f"Module {position.name!r} got an input of shape {tuple(x.shape)}, in which the {len(rows)} rows that "
                "tasks were given for cannot be told apart. Leave the module out with exclude_modules, or use one task "
                "per batch."
            )
        return rows if size == len(rows) else rows.repeat_interleave(size // len(rows))

    def _keeps_rows(self, num_rows: int, x: Tensor, position: Position) -> bool:
        size = len(x)
        if re.search(r"(^|\.)experts(\.|$)", position.name):
            # A mixture's expert gets the tokens that chose it, whatever their number.
            return False
        if size % num_rows:
            return False
        if self.batch_size is None or size in (num_rows, self.batch_size):
            # Sequence-first activations are only recognisable where the two dimensions differ.
            return True
        if x.ndim > 2:
            return x.shape[1] != self.batch_size
        return self.length is not None and size in (num_rows * self.length, self.batch_size * self.length)


def main_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first input of a base model that is a tensor with rows, from which their number is told; None without one."""
    names = (getattr(model, "main_input_name", "input_ids"), "inputs", "input_ids", "inputs_embeds")
    candidates = (*args[:1], *(kwargs.get(name) for name in names))
    return next((value for value in candidates if isinstance(value, Tensor) and value.ndim), None)
