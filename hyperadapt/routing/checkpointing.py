"""Gradient checkpointing that carries the factors of its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.routing.router import Router


class CheckpointFunction:
    """A block's gradient checkpointing function that also carries the block's factors.

    The factors enter the checkpoint as explicit tensor arguments. Recomputation in backward then uses
    those of its own forward pass, and gradients reach the hypernetwork through the outer graph, once, in
    both modes (a reentrant checkpoint would otherwise run backward through the hypernetwork per block).
    """

    def __init__(self, function: Callable[..., Any], router: Router, positions: Sequence[str]) -> None:
        self.function = function
        self.router = router
        self.positions = positions

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a block: ``run(*args)`` with the options of the checkpointing function."""
        current = self.router.current
        assert current is not None
        places = [
            (adapter_name, position)
            for adapter_name, routed in current.routed.items()
            for position in self.positions
            if position in routed.factors
        ]
        tensors = [tensor for name, position in places for tensor in current.routed[name].factors[position]]
        # Without the factors, which are arguments of the block.
        others = {name: replace(routed, factors={}) for name, routed in current.routed.items()}
        # The rows are those of this call, whatever is called until it is recomputed.
        bare = replace(current, routed={})

        def replay(*arguments: Any) -> Any:
            factors: dict[str, dict[str, Factors]] = {name: {} for name in others}
            for index, (name, position) in enumerate(places):
                factors[name][position] = Factors(*arguments[3 * index : 3 * index + 3])
            routed = {name: replace(other, factors=factors[name]) for name, other in others.items()}
            with self.router.installed(replace(bare, routed=routed)):
                return run(*arguments[len(tensors) :])

        return self.function(replay, *tensors, *args, **kwargs)


@contextmanager
def factors_carried(model: nn.Module, router: Router, names_in: Callable[[nn.Module], Sequence[str]]) -> Iterator[None]:
    """Let the model's gradient checkpointing carry factors during a forward pass; nothing stays behind on the blocks.

    ``names_in(block)`` names the positions in a block.
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    if model.training and torch.is_grad_enabled():
        for module in model.modules():
            # Read from __dict__: a wrapper must not be found through another module.
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and getattr(module, "gradient_checkpointing", False):
                carrying = CheckpointFunction(function, router, names_in(module))
                module.__dict__["_gradient_checkpointing_func"] = carrying
                wrapped.append((module, function))
    try:
        yield
    finally:
        for module, function in wrapped:
            module.__dict__["_gradient_checkpointing_func"] = function
