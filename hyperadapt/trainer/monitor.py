"""Sizes of updates and of gradients at every position, to see which one diverges, and which are at their bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.saturation import SATURATED, Saturation
from hyperadapt.normalization.formulas import frobenius_norm_squared


class PositionMonitor:
    """Watches what a network generates, and the gradients of it, while the model trains."""

    def __init__(self, network: HyperAdapterNetwork) -> None:
        self._updates: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._saturated: dict[str, Tensor] = {}
        self._passes = 0
        network.register_forward_hook(self._watch)

    def collect(self) -> tuple[dict[str, float], dict[str, float], Saturation | None]:
        """What was seen since the last call, in this process: largest update and norm of the gradient by position name.

        The update is ‖ΔW‖_F / ‖W₀‖_F of any task; the gradient is the one by the factors A and B of all tasks of a
        forward pass, as the root mean square over the passes. Last, which of the updates of all passes were at their
        bound; None if nothing was seen or there is no bound.
        """
        updates = {name: float(value) for name, value in self._updates.items()}
        gradients = {name: float((total / self._passes).sqrt()) for name, total in self._gradients.items()}
        saturated = {name: float(total / self._passes) for name, total in self._saturated.items()}
        self._updates, self._gradients, self._saturated, self._passes = {}, {}, {}, 0
        return updates, gradients, Saturation.of(saturated) if saturated else None

    def _watch(self, network: nn.Module, inputs: Sequence[Any], generated: dict[str, Factors]) -> None:
        assert isinstance(network, HyperAdapterNetwork)
        if not network.training or not torch.is_grad_enabled():
            return
        self._passes += 1
        for position, base_norm in zip(network.positions, network.position_norms, strict=True):
            name, factors = position.name, generated[position.name]
            update = _largest_update(factors) / base_norm
            self._updates[name] = torch.maximum(self._updates.get(name, update), update)
            for tensor in (factors.lora_A, factors.lora_B):
                tensor.register_hook(partial(self._add_gradient, name))  # type: ignore[no-untyped-call]
        for name, shares in network.bound_shares(generated).items():
            _add(self._saturated, name, (shares >= SATURATED).float().mean())

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        _add(self._gradients, name, gradient.detach().float().square().sum())


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value


@torch.no_grad()
def _largest_update(factors: Factors) -> Tensor:
    """Largest ‖B·S·A‖_F of any task, of all experts together, without the product."""
    factors = Factors(*(tensor.float() for tensor in factors))
    A, B = factors.lora_A, factors.outer()
    squared = frobenius_norm_squared(A @ A.mT, B.mT @ B)
    return squared.flatten(1).sum(1).amax().sqrt() if squared.ndim > 1 else squared.amax().sqrt()
