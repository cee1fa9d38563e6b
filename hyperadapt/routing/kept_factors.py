"""Factors of pinned tasks, kept while nothing that they follow from has changed."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hyperadapt.hypernetwork.factors import Factors

# Of pinned tasks, so that going back to one is a look-up; each takes the memory of a LoRA.
KEPT_TASKS = 8

Kept = dict[str, dict[str, Factors]]


class KeptFactors:
    """By adapter, the state that the factors were generated in, and by task the factors of each position."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Kept]] = {}

    def find(self, adapter_name: str, task: str, state: object) -> dict[str, Factors] | None:
        """The factors of a task, if they were generated in this state."""
        return self._of(adapter_name, state).get(task)

    def keep(self, adapter_name: str, task: str, state: object, factors: dict[str, Factors]) -> None:
        """Keep a task's factors, as those used last; the ones used longest ago go."""
        # A copy, since other threads may read.
        kept = dict(self._of(adapter_name, state))
        kept.pop(task, None)
        kept[task] = factors
        if len(kept) > KEPT_TASKS:
            del kept[next(iter(kept))]
        self._kept[adapter_name] = state, kept

    def drop(self, adapter_name: str) -> None:
        """Let the factors be generated anew when they are next needed."""
        self._kept.pop(adapter_name, None)

    def _of(self, adapter_name: str, state: object) -> Kept:
        known, kept = self._kept.get(adapter_name, (state, {}))
        return kept if known == state else {}


def state_of(network: nn.Module, dtype: torch.dtype | None) -> tuple[object, ...]:
    """What changes whenever a tensor of the network is replaced, moved, cast or written to."""
    _count_optimizer_steps()
    tensors = [*network.parameters(), *network.buffers()]
    # What is trained may be swapped through `parameter.data` between two evaluations (averaged weights), which counts
    # no versions, and tensors made in inference mode count none either: nothing may be kept for them.
    versions = (
        object() if t.requires_grad or t.is_inference() else (t.data_ptr(), t._version, t.dtype) for t in tensors
    )
    return dtype, _optimizer_steps, *versions


_optimizer_steps = 0


@functools.cache
def _count_optimizer_steps() -> None:
    """Fused optimisers write to parameters without counting versions; watched once there is something to keep."""

    def count(*_: object) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)
