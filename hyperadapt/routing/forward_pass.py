"""The factors of the current forward pass, and which task each row of an activation uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

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
class Scope:
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
        """Take note of the base model's input; the first one must have a row per task, later ones may be beams.

        Args:
            model_input: Main input of the base model, shape ``(batch, ...)``.

        Raises:
            ValueError: If the number of tasks is not the number of rows.
        """
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
        """The task of each element of an activation's first dimension.

        Args:
            rows: Task of each row of the batch, shape ``(batch,)``.
            x: The activation; its first dimension is the batch, the batch with each row repeated (beams,
                windows), or the batch's tokens, flattened.
            position: Where the activation goes in.

        Returns:
            Shape ``(len(x),)``.

        Raises:
            ValueError: If rows cannot be told apart in the activation.
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


class ScopeOwner:
    """What scopes are opened for. While a graph is traced, the open scope is kept here: contexts cannot be traced."""

    def __init__(self) -> None:
        self.traced_scope: Scope | None = None


# By owner, and not an attribute of it: each thread sees its own forward pass, and a router can be copied.
_current: ContextVar[Mapping[int, Scope]] = ContextVar("hyperadapt_scopes", default=MappingProxyType({}))


def current_scope(owner: ScopeOwner) -> Scope | None:
    """The scope that is open in this thread.

    Args:
        owner: Whose scope.

    Returns:
        The innermost scope, or None.
    """
    if torch.compiler.is_compiling() and owner.traced_scope is not None:
        return owner.traced_scope
    scope: Scope | None = _scope_of_context(owner)
    return scope


# Only reached by a graph of less than the whole model, which has to break here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scope_of_context(owner: ScopeOwner) -> Scope | None:
    return _current.get().get(id(owner))


@contextmanager
def installed(owner: ScopeOwner, scope: Scope) -> Iterator[None]:
    """Make a scope the current one of this thread.

    Args:
        owner: Whose scope.
        scope: The scope.

    Yields:
        None.
    """
    if torch.compiler.is_compiling():
        outer, owner.traced_scope = owner.traced_scope, scope
        try:
            yield
        finally:
            owner.traced_scope = outer
        return
    token = _current.set({**_current.get(), id(owner): scope})
    try:
        yield
    finally:
        _current.reset(token)
