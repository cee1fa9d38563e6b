"""Gradient checkpointing that carries the factors of its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.routing.forward_pass import Scope, current_scope, installed
from hyperadapt.routing.router import Router


class CheckpointFunction:
    """A block's gradient checkpointing function that also carries the block's factors.

    The factors enter the checkpoint as explicit tensor arguments. Recomputation in backward then uses
    those of its own forward pass, and gradients reach the hypernetwork through the outer graph, once, in
    both modes (a reentrant checkpoint would otherwise run backward through the hypernetwork per block).

    Args:
        function: The checkpointing function, called as ``function(run, *args, **kwargs)``.
        router: The router.
        positions: Names of the positions in the block.
    """

    def __init__(self, function: Callable[..., Any], router: Router, positions: Sequence[str]) -> None:
        self.function = function
        self.router = router
        self.positions = positions

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a block.

        Args:
            run: The block.
            *args: Its arguments.
            **kwargs: Options of the checkpointing function.

        Returns:
            The block's output.
        """
        scope = current_scope(self.router)
        assert scope is not None
        places = [
            (adapter_name, position)
            for adapter_name, routed in scope.routed.items()
            for position in self.positions
            if position in routed.factors
        ]
        tensors = [tensor for name, position in places for tensor in scope.routed[name].factors[position]]
        # Without the factors, which are arguments of the block.
        others = {name: replace(routed, factors={}) for name, routed in scope.routed.items()}
        batch_size, length = scope.batch_size, scope.length

        def replay(*arguments: Any) -> Any:
            factors: dict[str, dict[str, Factors]] = {name: {} for name in others}
            for index, (name, position) in enumerate(places):
                factors[name][position] = Factors(*arguments[3 * index : 3 * index + 3])
            routed = {name: replace(other, factors=factors[name]) for name, other in others.items()}
            with installed(self.router, Scope(routed, batch_size=batch_size, length=length)):
                return run(*arguments[len(tensors) :])

        return self.function(replay, *tensors, *args, **kwargs)
