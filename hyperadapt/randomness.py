"""Python's, numpy's and torch's random numbers, which go on as if nothing had been drawn or seeded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def randomness_kept(devices: Iterable[int | torch.device]) -> Iterator[None]:
    """Put all random states back at the end, of GPUs those of the devices."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices, enabled=not torch.compiler.is_compiling()):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
