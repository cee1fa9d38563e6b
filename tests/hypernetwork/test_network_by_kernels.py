"""A whole network by kernels, under Triton's interpreter or on a GPU, against the same by formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.hypernetwork.positions import Position
from hyperadapt.normalization.formulas import METHODS
from tests.hypernetwork.test_network import make_network
from tests.support.kernels import INTERPRETED, NEEDS_KERNELS, PLACE, let_kernels_serve, run_interpreted
from tests.support.tolerances import BFLOAT16_PRODUCT, FLOAT32_CONDITIONED, FLOAT32_FORMULA

# Two ranks and four shapes, one of them twice.
POSITIONS = [
    Position("h.0.q", 48, 32, r=4, scaling=1.5),
    Position("h.0.up", 32, 70, r=3),
    Position("h.1.q", 48, 32, r=4, scaling=1.5),
    Position("h.1.down", 21, 48, r=3),
    Position("classifier", 16, 5, r=4),
]


def updates_and_gradients(dtype: torch.dtype, changes: dict[str, Any]) -> list[Tensor]:
    """The updates of three tasks, and the gradients of all parameters."""
    network = make_network(POSITIONS, **changes).to(PLACE, dtype)
    factors = network(torch.tensor([2, 0, 1], device=PLACE))
    updates = [factors[position.name].delta_weight() for position in POSITIONS]
    torch.manual_seed(1)
    directions = [torch.randn(update.shape).to(update) for update in updates]
    gradients = torch.autograd.grad(updates, list(network.parameters()), directions, materialize_grads=True)
    return [*(update.detach() for update in updates), *gradients]


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"normalization": method} for method in ("soft_frobenius", "adaptive", "whitening", "sinkhorn")],
    ids=lambda changes: changes["normalization"],
)
def test_a_network_by_kernels_equals_that_by_formulas(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    from hyperadapt.normalization import gram_triton

    calls = []
    of_numbers = METHODS[changes["normalization"]].kernel == "scale"
    for name in ("scale_forward", "scale_backward") if of_numbers else ("gram_forward", "gram_backward"):
        launch = getattr(gram_triton, name)
        monkeypatch.setattr(gram_triton, name, lambda *args, launch=launch: (calls.append(launch), launch(*args)))
    monkeypatch.setenv("HYPERADAPT_KERNELS", "reference")
    expected = updates_and_gradients(dtype, changes)
    assert not calls
    monkeypatch.delenv("HYPERADAPT_KERNELS")
    if INTERPRETED:
        let_kernels_serve(monkeypatch)
    actual = updates_and_gradients(dtype, changes)
    # Once for each rank, forward and backward.
    assert len(calls) == 4
    # Of a gain the gradient is a sum of thousands of products, which nearly cancels.
    has_gain = METHODS[changes["normalization"]].is_unit
    error = FLOAT32_CONDITIONED if has_gain else FLOAT32_FORMULA
    if dtype == torch.bfloat16:
        error = 4 * BFLOAT16_PRODUCT
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=error, atol=error * float(other.abs().max()))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_networks_under_the_interpreter() -> None:
    run_interpreted(__file__, "by_kernels_equals", "4 passed, 4 skipped")
