"""What ``use_tasks`` asks for, seen by the thread and the asyncio task that is inside of it and by no other."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from types import FrameType, MappingProxyType

import torch

from hyperadapt.routing.forward_pass import ForwardPass
from hyperadapt.routing.requests import Request

# Functions that call a model for rows which they sort, or take a few at a time.
_REARRANGING = {
    "sentence_transformers.": {"encode", "predict"},
    "transformers.pipelines": {"__call__"},
    "transformers.trainer": {"_inner_training_loop", "evaluation_loop", "prediction_loop"},
}

# By router, and not attributes of it, so that a router can be copied.
_innermost: ContextVar[Mapping[int, Scope]] = ContextVar("hyperadapt_scopes", default=MappingProxyType({}))
_open: defaultdict[int, list[Scope]] = defaultdict(list)


class Scope(ForwardPass):
    """All calls inside of one ``use_tasks``, which lies in an outer one or in none."""

    def __init__(self, request: Request, outer: Scope | None) -> None:
        super().__init__({}, request)
        self.outer, self.thread = outer, threading.get_ident()
        self.opened_by = id(_caller())

    def check_rows_keep_their_order(self) -> None:
        """Refuse tasks by row around code that is known to sort rows, or to call the model for some of them at a time.

        The call looks the same then, so the code is known by its name alone.
        """
        if self.request.num_rows is None or torch.compiler.is_compiling():
            return
        frame = _caller()
        while frame is not None and id(frame) != self.opened_by:
            module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if any(module.startswith(name) and function in functions for name, functions in _REARRANGING.items()):
                raise ValueError(
                    f"use_tasks has a task for each of {self.request.num_rows} rows, but {function} of {module} sorts "
                    "or splits the rows that it is given, so that they would get each other's tasks. Call it once for "
                    "the rows of each task, with one name in use_tasks."
                )
            frame = frame.f_back


def _caller() -> FrameType | None:
    """The innermost frame of code that is neither ours nor opens a context."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("hyperadapt.", "contextlib")):
        frame = frame.f_back
    return frame


class _Traced(threading.local):
    """What graphs see, which cannot read contexts: by router the innermost scope of the thread."""

    def __init__(self) -> None:
        self.scopes: dict[int, Scope | None] = {}


_traced = _Traced()


@contextmanager
def opened(key: int, request: Request) -> Iterator[None]:
    """Let the calls inside that ask for nothing mean a request."""
    scopes = _innermost.get()
    scope = Scope(request, scopes.get(key))
    _innermost.set({**scopes, key: scope})
    _open[key].append(scope)
    _update_traced(key)
    try:
        yield
    finally:
        # Not a token, which an asynchronous generator may have to reset in another context.
        _innermost.set(scopes)
        _open[key].remove(scope)
        _update_traced(key)


def innermost(key: int) -> Scope | None:
    """The scope that a call is in."""
    if not torch.compiler.is_compiling():
        return _innermost.get().get(key)
    if key in _traced.scopes and _traced.scopes[key] is None:
        raise RuntimeError(
            "Several asyncio tasks of this thread are inside of use_tasks, and a compiled model cannot tell which of "
            "them calls it. Pass tasks= instead."
        )
    return _traced.scopes.get(key)


def is_open_elsewhere(key: int) -> bool:
    """Whether only other threads or asyncio tasks are inside of ``use_tasks``."""
    return innermost(key) is None and bool(_open[key])


def _update_traced(key: int) -> None:
    here = [scope for scope in _open[key] if scope.thread == threading.get_ident()]
    if not here:
        _traced.scopes.pop(key, None)
    else:
        is_nested = all(inner.outer is outer for outer, inner in pairwise(here))
        _traced.scopes[key] = here[-1] if is_nested else None
