"""Sinkhorn's mixing: the naive definition, sums, large logits, the limit of low temperature."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.matrix_functions import sinkhorn
from tests.support.tolerances import (
    FLOAT32_FORMULA,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
    SINKHORN_SUM,
    sinkhorn_permutation_error,
)


def naive_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    matrix = logits.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return matrix


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_passes_alternate_between_columns_and_rows(iterations: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    actual = sinkhorn(logits, iterations=iterations, temperature=temperature)
    expected = naive_sinkhorn(logits / temperature, iterations)
    assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    direction = torch.randn_like(actual)
    gradients = [torch.autograd.grad(value, logits, direction)[0] for value in (actual, expected)]
    assert_close(*gradients, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize("r", [1, 4, 8, 16])
@pytest.mark.parametrize(("normal", "iterations"), [(False, 20), (True, 40)])
def test_rows_and_columns_sum_to_one(r: int, normal: bool, iterations: int) -> None:
    torch.manual_seed(0)
    # Logits of size 1 need 20 iterations; the tails of normal ones more, at r = 4 in one matrix of a thousand.
    logits = torch.randn(500, r, r) if normal else 2 * torch.rand(500, r, r) - 1
    mixed = sinkhorn(logits, iterations=iterations, temperature=1.0)
    assert mixed.dtype == torch.float32
    assert (mixed > 0).all()
    assert_close(mixed.sum(-1), torch.ones(500, r), rtol=0, atol=FLOAT32_FORMULA)
    assert_close(mixed.sum(-2), torch.ones(500, r), rtol=0, atol=SINKHORN_SUM)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: sinkhorn(logits, iterations=5, temperature=0.7),
        (logits,),
        rtol=FLOAT64_GRADCHECK,
        atol=FLOAT64_GRADCHECK,
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_do_not_overflow(sign: int) -> None:
    torch.manual_seed(0)
    logits = (1e3 * (torch.randn(50, 4, 4) + sign)).requires_grad_()
    assert not naive_sinkhorn(logits, 20).isfinite().all()
    mixed = sinkhorn(logits, iterations=20, temperature=1.0)
    [gradient] = torch.autograd.grad(mixed, logits, torch.randn_like(mixed))
    assert mixed.isfinite().all()
    assert gradient.isfinite().all()
    assert_close(mixed.sum(-1), torch.ones(50, 4), rtol=0, atol=SINKHORN_SUM)


def test_the_mixing_approaches_the_best_permutation_at_low_temperature() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0], [4.0, 1.0, 2.0], [1.0, 3.0, 0.0]], dtype=torch.float64)
    totals = {p: sum(logits[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(3))}
    best, second, *_ = sorted(totals, key=totals.__getitem__, reverse=True)
    assert totals[best] == totals[second] + 1
    for iterations in (20, 200, 2000):
        mixed = sinkhorn(logits, iterations=iterations, temperature=0.02)
        tolerance = sinkhorn_permutation_error(iterations)
        assert_close(mixed, torch.eye(3, dtype=torch.float64)[list(best)], rtol=0, atol=tolerance)
