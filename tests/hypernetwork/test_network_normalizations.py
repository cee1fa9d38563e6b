"""Tests of what single normalisations add to an adapter's network: learned bounds, mixing, how near a bound is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperadapt.config import HEADS
from hyperadapt.hypernetwork.hypernetwork import Generated
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.normalization.formulas import BOUNDED_NORMALIZATIONS, METHODS, NORMALIZATIONS, UNIT_NORMALIZATIONS
from tests.hypernetwork.test_network import BASE_NORMS, LONGEST, POSITIONS, generate, make_network, norms
from tests.support.tolerances import (
    BFLOAT16_PRODUCT,
    EPS_FLOAT32,
    FLOAT32_FORMULA,
    FLOAT64_EXACT,
    norm_error,
    sample_variance_error,
)

WHITENING_A = {"normalization": "whitening", "normalization_factors": "A"}
# Ranks differ, and an update of the third position has one direction.
MIXED_RANKS = [
    Position("h.0.q", 6, 4, r=2, scaling=1.5),
    Position("h.0.up", 4, 10, r=3, scaling=1.0),
    Position("h.1.q", 6, 1, r=2, scaling=1.5),
    Position("h.1.up", 4, 10, r=3, scaling=1.0),
    Position("classifier", 6, 3, r=2, scaling=1.5),
]
EACH = [*({"normalization": method} for method in NORMALIZATIONS), WHITENING_A]


def loss(network: HyperAdapterNetwork) -> Tensor:
    """A function of the updates that no symmetry makes stationary."""
    torch.manual_seed(1)
    return sum((one.delta_weight() * torch.randn(one.delta_weight().shape)).sum() for one in generate(network).values())


def generated(network: HyperAdapterNetwork) -> list[Generated]:
    return network.hypernetwork(network.task_embedding(torch.arange(3)), network.positions)


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_parameters_exist_only_where_they_are_used(changes: dict[str, Any]) -> None:
    network = make_network(**changes, init_weights=True)
    plain = {name for name, _ in make_network(normalization="none").named_parameters()}
    extra = {name for name, _ in network.named_parameters()} - plain
    method = changes["normalization"]
    expected = set()
    if method in UNIT_NORMALIZATIONS and changes != WHITENING_A:
        expected |= {"gain"}
        assert torch.equal(network.gain, torch.zeros(5))
        assert torch.equal(make_network(**changes, init_weights=False).gain, torch.ones(5))
    if METHODS[method].learns_bound:
        expected |= {"bound_logit"}
        assert torch.equal(network.bound_logit, torch.zeros(5))
    if "logits" in METHODS[method].needs:
        expected |= {"hypernetwork.heads.mixing_r2.weight"}
    assert extra == expected


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_training_starts_where_zero_is_defined_and_can_leave_it(changes: dict[str, Any]) -> None:
    network = make_network(**changes, init_weights=True)
    hypernetwork = network.hypernetwork
    is_zero = {name: bool((head.weight == 0).all()) for name, head in hypernetwork.heads.items()}
    is_zero |= {f"{name} shared": bool((shared == 0).all()) for name, shared in hypernetwork.shared.items()}
    assert not any(zero for name, zero in is_zero.items() if name.startswith("A"))
    zeros = [zero for name, zero in is_zero.items() if name.startswith("B")]
    assert all(zeros) == (not hasattr(network, "gain"))
    assert any(zeros) == all(zeros)

    loss(network).backward()
    moving = [name for name, p in network.named_parameters() if p.grad is not None and (p.grad != 0).any()]
    assert moving
    for parameter in network.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    # Either the gain moves, or the heads of B.
    assert all(name == "gain" or name.startswith(("hypernetwork.heads.B", "hypernetwork.shared.B")) for name in moving)


def test_learned_bounds_act_on_their_own_positions() -> None:
    network = make_network(normalization="adaptive", lora_alpha=64)
    for index in range(5):
        [gradient] = torch.autograd.grad(norms(generate(network))[:, index].sum(), network.bound_logit)
        assert gradient.nonzero().flatten().tolist() == [index]
        # A larger bound makes the update larger.
        assert gradient[index] > 0


@pytest.mark.parametrize("logits", [(-1.0, 0.0, 1.0, 3.0, 8.0), (-1e4, -50.0, 50.0, 1e4, math.inf)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_learned_the_configured_bound_holds(logits: tuple[float, ...], dtype: torch.dtype) -> None:
    network = make_network(normalization="adaptive", normalization_bound=0.125, lora_alpha=64)
    grow(network, 1e3)
    with torch.no_grad():
        network.bound_logit.copy_(torch.tensor(logits))
    network.to(dtype)
    relative = norms(generate(network)) / BASE_NORMS.double()
    error = norm_error(LONGEST, EPS_FLOAT32) if dtype == torch.float32 else BFLOAT16_PRODUCT
    learned = 0.125 * (2 + torch.tensor(logits)).clamp(min=-10).sigmoid()
    assert (relative > 0).all()
    assert (relative <= learned * (1 + error)).all()
    loss(network.float()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_mixing_starts_near_the_identity_and_the_same_everywhere(head: str) -> None:
    groups = generated(make_network(normalization="sinkhorn", head=head, r=4, init_weights=True))
    assert sum(len(group.positions) for group in groups) == len(POSITIONS)
    for group in groups:
        assert group.logits is not None
        assert torch.equal(group.logits, 4 * torch.eye(4).expand(3, len(group.positions), 4, 4))
        mixing = group.logits.softmax(-1)
        # exp(4) = 55 against at most three ones.
        assert (mixing.diagonal(dim1=-2, dim2=-1) > 0.9).all()


@pytest.mark.parametrize("head", HEADS)
def test_mixing_logits_receive_gradients_and_act(head: str) -> None:
    network = make_network(normalization="sinkhorn", normalization_bound=1e6, head=head, r=4)
    mixing = network.hypernetwork.heads["mixing_r4"]
    assert mixing.weight.shape == ((4 if head == "row" else 16), 16)
    before = {name: one.core for name, one in generate(network).items()}
    loss(network).backward()
    assert mixing.weight.grad is not None
    assert (mixing.weight.grad != 0).any(dim=1).all()
    torch.manual_seed(2)
    with torch.no_grad():
        mixing.weight.copy_(8 * torch.randn(mixing.weight.shape))
    for name, one in generate(network).items():
        assert not torch.allclose(one.core, before[name], atol=0.01), name
    for group in generated(network):
        assert group.logits is not None
        # Every task and position mixes in its own way.
        assert len(torch.unique(group.logits.flatten(0, 1), dim=0)) == 3 * len(group.positions)
        assert not torch.allclose(group.logits, group.logits.mT)


@pytest.mark.parametrize("head", HEADS)
def test_each_cores_mixing_is_that_of_its_own_position(head: str) -> None:
    network = make_network(
        normalization="sinkhorn", normalization_bound=1e6, head=head, normalization_iterations=3, r=4
    )
    torch.manual_seed(2)
    with torch.no_grad():
        network.hypernetwork.heads["mixing_r4"].weight.copy_(
            8 * torch.randn(network.hypernetwork.heads["mixing_r4"].weight.shape)
        )
        network.gain.copy_(torch.arange(1.0, 6.0))
    factors = generate(network)
    for group in generated(network):
        assert group.logits is not None
        mixing = group.logits.exp()
        for _ in range(3):
            mixing = mixing / mixing.sum(-2, keepdim=True)
            mixing = mixing / mixing.sum(-1, keepdim=True)
        for index, position in enumerate(group.positions):
            one, place = factors[position.name], network.positions.index(position)
            unit = one.core * one.lora_B.norm(dim=-2).unsqueeze(-1) * one.lora_A.norm(dim=-1).unsqueeze(-2)
            expected = (place + 1) * BASE_NORMS[place] * mixing[:, index]
            torch.testing.assert_close(unit, expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("normalization", ["soft_polar", "whitening", "soft_frobenius"])
@pytest.mark.parametrize("growth", [1.0, 1e3])
def test_half_precision_factors_act_like_exact_ones_where_one_direction_has_grown(
    normalization: str, growth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(normalization=normalization, normalization_bound=0.05, r=4, lora_alpha=4)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    grown = rotation * torch.tensor([growth, 1.0, 1.0, 1.0]) @ rotation.T
    groups = [group._replace(lora_B=group.lora_B @ grown) for group in generated(network)]
    monkeypatch.setattr(network.hypernetwork, "forward", lambda *_: groups)
    exact, half = (network(torch.arange(3), None, dtype) for dtype in (None, torch.bfloat16))
    for position in POSITIONS:
        x, rows = torch.randn(3, 50, position.in_features), torch.arange(3)
        expected = exact[position.name].apply(x, rows)
        actual = half[position.name].apply(x.bfloat16(), rows).float()
        # x, A, B·S and the product of the first two are rounded.
        assert (actual - expected).norm() < 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize(
    ("changes", "variance"),
    [
        ({"normalization": "frobenius"}, 1.0),
        ({"normalization": "soft_frobenius", "init_weights": False}, 1 / 8),
        (WHITENING_A, 0.0),
    ],
    ids=str,
)
def test_b_starts_at_unit_variance_before_a_unit_norm(changes: dict[str, Any], variance: float) -> None:
    network = make_network(**({"init_weights": True, "r": 8, "hypernetwork_dim": 64} | changes))
    # Half of the variance is the heads', whose outputs are products divided by the dimension.
    heads, shared = network.hypernetwork.heads, network.hypernetwork.shared
    from_heads = [head.weight.square().mean().item() / 64 for name, head in heads.items() if name.startswith("B")]
    from_shared = [values for name, values in shared.items() if name.startswith("B")]
    for part in (*from_heads, *(values.square().mean().item() for values in from_shared)):
        error = sample_variance_error(min(values.numel() for values in from_shared))
        assert part == pytest.approx(variance / 2, rel=error)


def grow(network: HyperAdapterNetwork, factor: float) -> None:
    """Multiply what the hypernetwork emits for B."""
    with torch.no_grad():
        for name, parameter in network.hypernetwork.named_parameters():
            if name.startswith(("heads.B", "shared.B")):
                parameter *= factor


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_shares_of_the_bound_are_those_of_dense_updates(method: str) -> None:
    network = make_network(MIXED_RANKS, normalization=method, normalization_bound=0.25).double()
    bounds = 0.25 * BASE_NORMS.double()
    if method == "adaptive":
        with torch.no_grad():
            network.bound_logit.copy_(torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0]))
        bounds = bounds / (1 + (-2 - network.bound_logit.detach()).exp())
    factors = generate(network)
    shares = network.bound_shares(factors)
    assert list(shares) == [position.name for position in MIXED_RANKS if position.r == 2] + ["h.0.up", "h.1.up"]
    for position, bound in zip(MIXED_RANKS, bounds, strict=True):
        spectra = torch.linalg.svdvals(factors[position.name].delta_weight().detach())
        sizes = spectra.norm(dim=-1)
        if METHODS[method].bounds_singular_values:
            sizes = spectra[:, 0] * position.r**0.5
        actual = shares[position.name]
        assert actual.shape == (3,)
        assert not actual.requires_grad
        torch.testing.assert_close(actual, sizes / bound, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
        assert (actual > 0.01).all()


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_the_share_is_whole_where_the_bound_is_reached_and_small_below(method: str) -> None:
    # Measured by anything but what is bounded, one direction would not fill the bound, or several would exceed it.
    shares = []
    for factor in (1e-3, 1e6):
        network = make_network(MIXED_RANKS, normalization=method, normalization_bound=0.125).double()
        grow(network, factor)
        shares.append(torch.stack([network.bound_shares(generate(network))[one.name] for one in MIXED_RANKS]))
    assert (shares[0] < 0.1).all()
    torch.testing.assert_close(shares[1], torch.ones_like(shares[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", UNIT_NORMALIZATIONS)
def test_of_a_gain_the_share_is_the_gains(method: str) -> None:
    network = make_network(MIXED_RANKS, normalization_bound=0.25, normalization=method).double()
    gains = torch.tensor([0.5, -0.2, 1e3, 1e-3, 0.0], dtype=torch.float64)
    with torch.no_grad():
        network.gain.copy_(gains)
    shares = network.bound_shares(generate(network))
    for position, gain in zip(MIXED_RANKS, gains, strict=True):
        # However small the unit update beside the largest: the gain cannot grow.
        reached = gain.abs() * METHODS[method].largest_norm(position.r) / 0.25
        expected = reached / (1 + reached**2).sqrt()
        torch.testing.assert_close(shares[position.name], expected.expand(3), rtol=FLOAT64_EXACT, atol=0)


@pytest.mark.parametrize("changes", [{"normalization": "none"}, WHITENING_A], ids=str)
def test_without_a_bound_there_are_no_shares_of_it(changes: dict[str, Any]) -> None:
    network = make_network(**changes)
    assert network.bound_shares(generate(network)) == {}


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_shares_of_factors_in_half_precision(method: str) -> None:
    network = make_network(normalization=method, r=4)
    exact, half = (network.bound_shares(network(torch.arange(3), None, dtype)) for dtype in (None, torch.bfloat16))
    for name, expected in exact.items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], expected, rtol=BFLOAT16_PRODUCT, atol=0)


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_what_is_not_finite_has_no_share(method: str) -> None:
    network = make_network(normalization=method)
    factors = generate(network)
    broken = factors["h.0.q"].lora_A.clone()
    broken[1] = torch.nan
    factors["h.0.q"] = factors["h.0.q"]._replace(lora_A=broken)
    shares = network.bound_shares(factors)
    assert shares["h.0.q"].isfinite().tolist() == [True, False, True]
    assert all(values.isfinite().all() for name, values in shares.items() if name != "h.0.q")
