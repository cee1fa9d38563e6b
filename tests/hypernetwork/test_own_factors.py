"""Factors of a task's own: added before the normalisation, to that task alone, in every way that tasks are called."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperadapt.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from tests.support.tolerances import FLOAT32_FORMULA

# Shapes alternate, so that groups are not in the order of the positions; experts have factors one by one.
POSITIONS = [
    Position("h.0.q", 6, 4, r=2),
    Position("h.0.up", 4, 10, r=2),
    Position("h.1.q", 6, 4, r=2),
    Position("h.1.experts", 6, 4, r=2, experts=3),
    Position("h.1.up", 4, 10, r=2),
]
IDS = torch.tensor([2, 0, 1, 3])
CLOSE = {"rtol": FLOAT32_FORMULA, "atol": FLOAT32_FORMULA}


def network(own: list[str], **changes: Any) -> HyperAdapterNetwork:
    """A network with updates, and own factors where they are asked for."""
    torch.manual_seed(0)
    settings = {"r": 2, "task_embedding_dim": 8, "hypernetwork_dim": 16, "init_weights": False}
    config = HyperAdapterConfig(tasks=["a", "b", "c", "d"], own_factors=own, **settings | changes)
    made = HyperAdapterNetwork(config, POSITIONS, torch.full((7,), 2.0))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.own_factors.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def same(first: Factors, second: Factors, rows: list[int]) -> bool:
    return all(torch.equal(one[rows], other[rows]) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("normalization", ["soft_polar", "spectral", "sinkhorn"])
def test_other_tasks_keep_every_bit(normalization: str, is_trained: bool) -> None:
    plain, own = network([], normalization=normalization), network(["c", "a"], normalization=normalization)
    assert not any("own_factors" in name for name in plain.state_dict())
    with torch.set_grad_enabled(is_trained):
        before, after = plain(IDS), own(IDS)
        for name in before:
            assert same(before[name], after[name], [2, 3])
            assert not any(torch.allclose(before[name].outer()[row], after[name].outer()[row]) for row in (0, 1))
        # Of one position on its own, as a layer outside of a forward pass asks for it, and of each task alone.
        for name, whole in after.items():
            [position] = [one for one in POSITIONS if one.name == name]
            part = own(IDS, [position])[name]
            assert all(torch.allclose(one, other, **CLOSE) for one, other in zip(part, whole, strict=True))
        alone = own(torch.tensor([2]))
        assert all(torch.allclose(alone[name].outer()[0], after[name].outer()[0], **CLOSE) for name in alone)


def test_both_ways_of_adding_are_one() -> None:
    made = network(["b", "d"])
    with torch.no_grad():
        written = made(IDS)
    chosen = made(IDS)
    assert all(same(written[name], chosen[name], [0, 1, 2, 3]) for name in written)


def test_a_task_is_what_was_generated_plus_its_own() -> None:
    plain, own = network([], normalization="none"), network(["c"], normalization="none")
    with torch.no_grad():
        before, after = plain(IDS), own(IDS)
    of_c = own.own_factors.of(0)
    # Of each shape the weights follow one another in the order of the positions.
    expected: list[tuple[str, str, Any]] = [
        ("h.0.q", "6x4_r2", 0), ("h.1.q", "6x4_r2", 1), ("h.1.experts", "6x4_r2_e3", slice(0, 3)),
        ("h.1.up", "4x10_r2", 1),
    ]  # fmt: skip
    for name, shape, place in expected:
        assert torch.allclose(after[name].lora_A[0], before[name].lora_A[0] + of_c[f"A_{shape}"][place], **CLOSE)
        rows = of_c[f"B_{shape}"][place].mT
        assert torch.allclose(after[name].lora_B[0], before[name].lora_B[0] + rows, **CLOSE)


def test_an_embedding_alone_has_none() -> None:
    plain, own = network([]), network(["a", "b", "c", "d"])
    embeddings = plain.task_embedding(IDS).detach()
    before, after = plain(embeddings), own(embeddings)
    assert all(same(before[name], after[name], [0, 1, 2, 3]) for name in before)


def test_the_bound_holds_with_own_factors() -> None:
    own = network(["a"], normalization="soft_frobenius", normalization_bound=0.5)
    with torch.no_grad():
        for parameter in own.own_factors.parameters():
            parameter.mul_(100)
        for name, one in own(torch.tensor([0])).items():
            norms = torch.linalg.matrix_norm(one.delta_weight())
            assert bool((norms <= 1.0 + 1e-5).all()), name
            assert bool((norms > 0.99).all()), name


@pytest.mark.parametrize("normalization", ["soft_polar", "sinkhorn"])
def test_gradients_reach_the_tasks_of_the_batch_alone(normalization: str) -> None:
    own = network(["a", "b"], normalization=normalization).double()
    wanted = {name: torch.randn_like(one.delta_weight()[1]) for name, one in own(IDS).items()}

    def loss() -> Tensor:
        found = own(torch.tensor([3, 0]))
        return torch.stack([(found[name].delta_weight()[1] * one).sum() for name, one in wanted.items()]).sum()

    loss().backward()
    of_a, of_b = own.own_factors.of(0), own.own_factors.of(1)
    for key, parameter in of_a.items():
        assert parameter.grad is not None
        assert bool(parameter.grad.flatten(1).any(1).all()), key
        # Against the slope between two points.
        with torch.no_grad():
            entry, step = (0, 1, 2), 1e-6
            start = float(parameter[entry])
            ends = []
            for sign in (1, -1):
                parameter[entry] = start + sign * step
                ends.append(float(loss()))
            parameter[entry] = start
        assert float(parameter.grad[entry]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    # They take part, as DDP asks, and are not moved.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in of_b.values())
