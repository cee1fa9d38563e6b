"""Stacks of weights with updates: what multiplies by them goes through the rank, all else gets the sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations import moe

from hyperadapt.tuner.stacked_weights import StackedWeights

EXPERTS, OUTPUTS, INPUTS, RANK, TOKENS = 3, 8, 4, 2, 5
IDS = torch.tensor([0, 2, 2, 1, 0])
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)

PRODUCTS: dict[str, Callable[[object, Tensor], Tensor]] = {
    "one expert": lambda weights, x: linear(x, weights[torch.tensor(1)], torch.ones(OUTPUTS)),
    "one transposed": lambda weights, x: x @ weights.transpose(-2, -1)[2],
    "transposed by position": lambda weights, x: torch.matmul(x, weights.transpose(1, 2)[0]),
    "an expert for each token": lambda weights, x: torch.bmm(weights[IDS], x.unsqueeze(-1)),
    "the same from the left": lambda weights, x: torch.bmm(x.unsqueeze(1), weights.transpose(-2, -1)[IDS]),
    "grouped": lambda weights, x: moe._grouped_mm(x, weights.transpose(-2, -1), offs=ENDS),
}
OTHERS: dict[str, Callable[[object, Tensor], Tensor]] = {
    "einsum": lambda weights, x: torch.einsum("eoi,ti->teo", weights, x),
    "another dtype": lambda weights, x: x.bfloat16() @ weights[1].bfloat16().T,
    "other dimensions": lambda weights, x: weights.transpose(0, 1) * x.sum(),
    "as a keyword": lambda weights, x: torch.einsum("oi,ti->to", weights[0], x).add(linear(x, weight=weights[0])),
}


def made() -> tuple[StackedWeights, Tensor, list[Tensor]]:
    """The weights, an input, and all that they are made of, with gradients but for the weight itself."""
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, OUTPUTS, INPUTS), (EXPERTS, OUTPUTS, RANK), (EXPERTS, RANK, INPUTS), (TOKENS, INPUTS)
    weight, left, right, x = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [one.requires_grad_() for one in (left, right, x)]
    return StackedWeights(weight, left, right), x, leaves


def result(function: Callable[[object, Tensor], Tensor], dense: bool) -> list[Tensor]:
    """The value, and the gradients by what it is made of."""
    weights, x, leaves = made()
    found = function(weights.dense() if dense else weights, x)
    found.float().square().sum().backward()
    return [found, *(one.grad for one in leaves)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_go_through_the_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = result(PRODUCTS[name], dense=True)
    monkeypatch.setattr(StackedWeights, "dense", None)
    torch.testing.assert_close(result(PRODUCTS[name], dense=False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_get_the_sum(name: str) -> None:
    torch.testing.assert_close(
        result(OTHERS[name], dense=False), result(OTHERS[name], dense=True), rtol=1e-4, atol=1e-4
    )


def test_an_update_of_zero_leaves_every_bit() -> None:
    weights, x, _ = made()
    weights.left.data.zero_()
    unchanged = StackedWeights(weights.weight, weights.left, weights.right)
    for function in PRODUCTS.values():
        assert torch.equal(function(unchanged, x), function(weights.weight, x))


def test_what_a_tensor_tells_of_itself() -> None:
    weights, _, _ = made()
    assert (weights.shape, weights.dtype, weights.device) == (weights.weight.shape, torch.float32, torch.device("cpu"))
    assert weights.size(0) == EXPERTS
    assert torch.equal(weights.sum(), weights.dense().sum())
    with pytest.raises(AttributeError, match="__nothing__"):
        _ = weights.__nothing__
