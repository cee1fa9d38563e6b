"""Tests of an adapter's network: scaling, bounds and gains in units of the base weights, order, precision."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperadapt.config import HEADS, HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.normalization import normalize
from hyperadapt.normalization.formulas import BOUNDED_NORMALIZATIONS, NORMALIZATIONS, UNIT_NORMALIZATIONS
from tests.support.helpers import full_core, letters, varied
from tests.support.tolerances import (
    BFLOAT16_NETWORK,
    BFLOAT16_PRODUCT,
    EPS_FLOAT32,
    FLOAT32_FORMULA,
    FLOAT32_FORWARD,
    norm_error,
)

# Shapes alternate, so that the groups the hypernetwork makes are not in the order of the positions.
POSITIONS = [
    Position("h.0.q", 6, 4, r=2, scaling=1.5),
    Position("h.0.up", 4, 10, r=2, scaling=1.5),
    Position("h.1.q", 6, 4, r=2, scaling=1.5),
    Position("h.1.up", 4, 10, r=2, scaling=1.5),
    Position("classifier", 6, 3, r=2, scaling=1.5),
]
BASE_NORMS = torch.tensor([2.0, 0.5, 30.0, 7.0, 1.0])
LONGEST = 10


def make_network(positions: list[Position] = POSITIONS, **changes: Any) -> HyperAdapterNetwork:
    """A network whose updates are not zero."""
    torch.manual_seed(0)
    options = {
        "r": 2,
        "lora_alpha": 3,
        "tasks": ["a", "b", "c"],
        "task_embedding_dim": 8,
        "hypernetwork_dim": 16,
        "init_weights": False,
    }
    config = HyperAdapterConfig(**(options | changes))
    if {"r", "lora_alpha"} & changes.keys():
        positions = [replace(position, r=config.r, scaling=config.lora_alpha / config.r) for position in positions]
    return HyperAdapterNetwork(config, positions, BASE_NORMS.clone())


def generate(network: HyperAdapterNetwork, positions: list[Position] | None = None) -> dict[str, Factors]:
    return network(network.task_embedding(torch.arange(3)), positions)


def norms(factors: dict[str, Factors]) -> Tensor:
    """Frobenius norms of the dense updates, shape (tasks, positions), in the order of POSITIONS."""
    dense = (factors[position.name] for position in POSITIONS)
    updates = (Factors(*(tensor.double() for tensor in one)).delta_weight() for one in dense)
    return torch.stack([torch.linalg.matrix_norm(update) for update in updates], dim=1)


def tensors(factors: dict[str, Factors]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return dict(factors)


@pytest.mark.parametrize(("head", "normalization"), varied(("factor", "sinkhorn"), HEADS, NORMALIZATIONS))
def test_every_position_gets_factors_of_its_shape(head: str, normalization: str) -> None:
    factors = generate(make_network(head=head, normalization=normalization))
    assert factors.keys() == {position.name for position in POSITIONS}
    for position in POSITIONS:
        one = factors[position.name]
        assert one.lora_A.shape == (3, 2, position.in_features)
        assert one.lora_B.shape == (3, position.out_features, 2)
        is_matrix = normalization in ("soft_polar", "adaptive", "whitening", "weight_norm", "sinkhorn")
        assert one.core.shape == ((3, 2, 2) if is_matrix else (3, 1, 1))


def test_without_normalization_the_core_is_the_scaling() -> None:
    for one in generate(make_network(normalization="none", lora_alpha=3, r=2)).values():
        assert torch.equal(one.core, torch.full((3, 1, 1), 1.5))


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_the_core_normalises_the_scaled_update(method: str) -> None:
    network = make_network(normalization=method, normalization_bound=0.25)
    # A learned bound starts at sigmoid(2) of the configured one.
    bound = 0.25 / (1 + math.exp(-2)) if method == "adaptive" else 0.25
    for position, base_norm in zip(POSITIONS, BASE_NORMS, strict=True):
        one = generate(network)[position.name]
        expected = 1.5 * normalize(one.lora_A, 1.5 * one.lora_B, method, bound=bound * base_norm)
        torch.testing.assert_close(full_core(one), expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_the_scaled_update_stays_below_the_bound_in_units_of_the_base_weight(method: str) -> None:
    bound = 0.125
    network = make_network(normalization=method, normalization_bound=bound, lora_alpha=64)
    with torch.no_grad():
        for name, head in network.hypernetwork.heads.items():
            if name.startswith("B"):
                head.weight *= 1e6
        if method == "adaptive":
            # The sigmoid of 40 is 1 in float32: no more than the configured bound can be learned.
            network.bound_logit.fill_(40)
    relative = norms(generate(network)) / BASE_NORMS.double()
    error = norm_error(LONGEST, EPS_FLOAT32)
    assert (relative <= bound * (1 + error)).all()
    # The updates are huge, so the bound is reached, at every position in its own unit.
    assert (relative >= bound * (1 - error)).all()


@pytest.mark.parametrize(
    "changes", [{"normalization": method} for method in UNIT_NORMALIZATIONS if method != "sinkhorn"], ids=str
)
def test_the_gain_multiplies_the_unscaled_unit_core(changes: dict[str, Any]) -> None:
    # Beside a bound of 1e6 the gains count as they are: (2 / 1e6)² is below float32's epsilon.
    network = make_network(**changes, normalization_bound=1e6)
    gains = torch.tensor([0.5, -2.0, 1.0, 1e-3, 0.0])
    with torch.no_grad():
        network.gain.copy_(gains)
    factors = generate(network)
    for position, gain in zip(POSITIONS, gains * BASE_NORMS, strict=True):
        one = factors[position.name]
        expected = gain * normalize(one.lora_A, one.lora_B, changes["normalization"])
        torch.testing.assert_close(full_core(one), expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("method", UNIT_NORMALIZATIONS)
def test_a_gained_update_stays_below_the_bound_in_units_of_the_base_weight(method: str) -> None:
    bound = 0.125
    network = make_network(normalization=method, normalization_bound=bound, r=3)
    with torch.no_grad():
        network.gain.copy_(torch.tensor([1e6, -1e6, 1e6, 1e-9, 0.0]))
    relative = norms(generate(network)) / BASE_NORMS.double()
    # Frobenius norms of unit updates: exactly 1; √r, by a ridge of 1e-5 less; or something up to r or √r.
    largest = bound * (1 + norm_error(LONGEST, EPS_FLOAT32))
    assert (relative <= largest).all()
    least = {"frobenius": 1.0, "whitening": 0.99, "weight_norm": 0.01, "sinkhorn": 0.01}
    assert (relative[:, :3] >= least.get(method, 3**-0.5) * bound * (1 - norm_error(LONGEST, EPS_FLOAT32))).all()
    assert (relative[:, 3:] <= 1e-8).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "whitening", "normalization_ridge": 0.5},
        {"normalization": "whitening", "normalization_factors": "A"},
    ],
    ids=str,
)
def test_the_configs_options_reach_the_normalization(changes: dict[str, Any]) -> None:
    network = make_network(**changes)
    options = {name.removeprefix("normalization_"): value for name, value in changes.items() if "_" in name}
    if options.get("factors") != "A":
        network.config.normalization_bound = 1e6
    # Whitening of A alone has no gain; the scaling applies to it.
    unit = torch.full((5,), 1.5) if options.get("factors") == "A" else BASE_NORMS
    factors = generate(network)
    for position, factor in zip(POSITIONS, unit, strict=True):
        one = factors[position.name]
        expected = factor * normalize(one.lora_A, one.lora_B, changes["normalization"], **options)
        torch.testing.assert_close(full_core(one), expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


def test_the_gain_counts_in_units_of_the_base_weights_norm() -> None:
    network = make_network(normalization="frobenius", normalization_bound=1e6)
    gains = torch.tensor([0.5, -2.0, 1.0, 1e-3, 0.0])
    with torch.no_grad():
        network.gain.copy_(gains)
    expected = (gains.abs() * BASE_NORMS).double().expand(3, -1)
    error = norm_error(LONGEST, EPS_FLOAT32)
    torch.testing.assert_close(norms(generate(network)), expected, rtol=error, atol=0)


def test_the_gains_sign_is_that_of_the_update() -> None:
    network = make_network(normalization="frobenius")
    before = generate(network)["h.0.up"].core
    with torch.no_grad():
        network.gain.neg_()
    assert torch.equal(generate(network)["h.0.up"].core, -before)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_training_starts_at_an_update_of_exactly_zero(normalization: str) -> None:
    network = make_network(normalization=normalization, init_weights=True)
    for one in generate(network).values():
        assert torch.equal(one.delta_weight(), torch.zeros_like(one.delta_weight()))


@pytest.mark.parametrize(
    ("normalization", "order"),
    varied(
        ("soft_frobenius", (1, 3, 0, 4, 2)),
        ["frobenius", "adaptive", "sinkhorn"],
        [(4, 3, 2, 1, 0), (3, 0), (2,)],
    ),
)
def test_the_order_of_positions_changes_nothing(normalization: str, order: tuple[int, ...]) -> None:
    network = make_network(normalization=normalization)
    # What is learned by position differs between positions.
    with torch.no_grad():
        for name in ("gain", "bound_logit"):
            if hasattr(network, name):
                getattr(network, name).copy_(torch.arange(1.0, 6.0))
    whole = tensors(generate(network))
    part = tensors(generate(network, [POSITIONS[index] for index in order]))
    assert part.keys() == {POSITIONS[index].name for index in order}
    expected = {name: whole[name] for name in part}
    torch.testing.assert_close(part, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_changes_nothing(normalization: str) -> None:
    network = make_network(normalization=normalization)
    expected = tensors(generate(network))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tensors(generate(network))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_changes_no_task() -> None:
    sources = {"a": "text", "b": "examples", "c": "both"}
    network = make_network(
        tasks={"a": "one", "b": "two", "c": "three"},
        task_embedding=sources,
        text_encoder=letters,
        text_embedding_dim=6,
        task_type="CAUSAL_LM",
        example_dim=4,
    ).eval()
    network.task_embedding.set_text_vectors(torch.randn(2, 6))
    network.task_embedding.example_rows.fill(torch.randn(1, 32, 8), [torch.randn(5, 8)], is_given=True)
    expected = tensors(network(torch.arange(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tensors(network(torch.arange(3)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("head", "normalization"), varied(("factor", "sinkhorn"), HEADS, NORMALIZATIONS))
def test_gradients_reach_every_parameter(head: str, normalization: str) -> None:
    network = make_network(head=head, normalization=normalization)
    x = {position.name: torch.randn(4, position.in_features) for position in POSITIONS}
    rows = torch.tensor([0, 1, 2, 1])
    factors = generate(network)
    sum(one.apply(x[name], rows).square().sum() for name, one in factors.items()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Every row: of the tasks, layers, modules, rows of a factor, outputs of a head.
        assert (parameter.grad.reshape(len(parameter), -1) != 0).any(dim=1).all(), name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_bfloat16_network_works_and_keeps_its_bounds(normalization: str) -> None:
    network = make_network(normalization=normalization, lora_alpha=64).to(torch.bfloat16)
    factors = generate(network)
    assert all(tensor.dtype == torch.bfloat16 for one in factors.values() for tensor in one)
    relative = norms(factors) / BASE_NORMS.double()
    if normalization in BOUNDED_NORMALIZATIONS:
        assert (relative <= 0.2 * (1 + BFLOAT16_PRODUCT)).all()
    elif normalization == "frobenius":
        # A gain of 1 under a bound of 0.2.
        torch.testing.assert_close(relative, torch.full_like(relative, 26**-0.5), rtol=BFLOAT16_PRODUCT, atol=0)
    else:
        expected = norms(generate(make_network(normalization=normalization, lora_alpha=64)))
        assert relative.isfinite().all()
        assert (relative * BASE_NORMS).sum().item() == pytest.approx(expected.sum().item(), rel=BFLOAT16_NETWORK)


def test_embeddings_of_another_dtype_are_accepted() -> None:
    network = make_network()
    embeddings = torch.randn(3, 8).to(torch.bfloat16)
    actual = tensors(network(embeddings))
    expected = tensors(network(embeddings.float()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_base_norms_are_saved_with_the_adapter() -> None:
    assert torch.equal(make_network().state_dict()["base_norms"], BASE_NORMS)
