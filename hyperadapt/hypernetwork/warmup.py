"""A bound that grows over the first optimizer steps, so that they do not throw the update to its bound at once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_warmups: weakref.WeakSet[BoundWarmup] = weakref.WeakSet()


class BoundWarmup(nn.Module):
    """Counts the optimizer steps that a network is trained with: of N, step k (from 1) has min(1, k/N) of the bound.

    The count, int64, is part of the state, so that training resumes where it was, and a network that was saved before
    the last of the N steps computes what it computed.
    """

    trained_steps: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("trained_steps", torch.zeros((), dtype=torch.int64))
        # Holds True while a step is expected; a set, which the replicas of DataParallel share.
        self._expected: set[bool] = set()
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy counts its own steps.
        _watch(self)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Share of the bound, shape (), in (0, 1]."""
        return ((self.trained_steps + 1).to(dtype) / self.steps).clamp(max=1)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the whole bound from now on."""
        self.trained_steps.fill_(self.steps)

    def expect_step(self) -> None:
        """Count the next step of any optimizer: of those after a forward pass, however many its gradients took."""
        self._expected.add(True)

    @torch.no_grad()
    def count_step(self) -> None:
        """Count a step, if one is expected."""
        if self._expected:
            self._expected.clear()
            self.trained_steps += 1


@contextmanager
def counting_paused(module: nn.Module) -> Iterator[None]:
    """Have optimizer steps count for no network in a module: what they train is something else."""
    warmups = [one for one in module.modules() if isinstance(one, BoundWarmup)]
    expected = [set(one._expected) for one in warmups]
    for one in warmups:
        one._expected.clear()
    try:
        yield
    finally:
        for one, before in zip(warmups, expected, strict=True):
            one._expected.update(before)


def _watch(warmup: BoundWarmup) -> None:
    _count_optimizer_steps()
    _warmups.add(warmup)


@functools.cache
def _count_optimizer_steps() -> None:
    def count(*_: object) -> None:
        for warmup in list(_warmups):
            warmup.count_step()

    register_optimizer_step_post_hook(count)
