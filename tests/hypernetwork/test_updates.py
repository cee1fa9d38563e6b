"""Inner products and singular values of updates against dense ones, in float64."""

import re

import pytest
import torch
from torch.testing import assert_close

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.updates import inner_product, pairwise_inner_products, singular_values
from tests.support.tolerances import EPS_FLOAT32, FLOAT64_EXACT, norm_error

EXACT = {"rtol": FLOAT64_EXACT, "atol": FLOAT64_EXACT}


def random_factors(
    *leading: int,
    r: int,
    core: int | None = None,
    shape: tuple[int, int] = (7, 5),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Factors:
    """The core is a matrix of the rank's size, or with 1 a number."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    sizes = (r, in_features), (out_features, r), (core or r, core or r)
    return Factors(*(torch.randn(*leading, *size, generator=generator, dtype=dtype) for size in sizes))


@pytest.mark.parametrize("cores", [(None, None), (1, None), (None, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("r", "s"), [(1, 1), (3, 2), (2, 6)])
def test_inner_product_is_that_of_dense_updates(r: int, s: int, cores: tuple[int | None, int | None]) -> None:
    x, y = random_factors(2, 4, r=r, core=cores[0]), random_factors(4, r=s, core=cores[1], seed=1)
    expected = (x.delta_weight() * y.delta_weight()).sum((-2, -1))
    assert_close(inner_product(x, y), expected, **EXACT)


def test_gradients_of_the_inner_product_are_those_of_dense_updates() -> None:
    x, y = random_factors(3, r=2), random_factors(3, r=4, seed=1)
    leaves = [tensor.requires_grad_() for tensor in (*x, *y)]
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    dense = (x.delta_weight() * y.delta_weight()).sum((-2, -1))
    expected = torch.autograd.grad((weights * dense).sum(), leaves)
    assert_close(torch.autograd.grad((weights * inner_product(x, y)).sum(), leaves), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairwise_inner_products_are_those_of_dense_updates(dtype: torch.dtype) -> None:
    x, y = random_factors(3, r=2, dtype=dtype), random_factors(4, r=5, core=1, seed=1, dtype=dtype)
    dense_x, dense_y = (Factors(*(tensor.double() for tensor in one)).delta_weight().flatten(1) for one in (x, y))
    assert_close(pairwise_inner_products(x, y), dense_x @ dense_y.T, **EXACT)


def test_pairwise_inner_products_do_not_depend_on_the_choice_of_factors() -> None:
    x, mixing = random_factors(3, r=4), random_factors(r=4, seed=1).core
    other = Factors(mixing @ x.lora_A, x.lora_B, x.core @ torch.linalg.inv(mixing))
    # The inverse multiplies the rounding by its condition number, below 100.
    assert torch.linalg.cond(mixing) < 100
    close = {"rtol": 100 * FLOAT64_EXACT, "atol": 100 * FLOAT64_EXACT}
    assert_close(pairwise_inner_products(other, x), pairwise_inner_products(x, x), **close)


@pytest.mark.parametrize("shape", [(7, 5), (3, 9), (9, 2)])
def test_singular_values_are_those_of_dense_updates(shape: tuple[int, int]) -> None:
    factors = random_factors(3, r=4, shape=shape)
    expected = torch.linalg.svdvals(factors.delta_weight())[:, : min(4, *shape)]
    assert_close(singular_values(factors), expected, **EXACT)


def test_small_singular_values_survive() -> None:
    left, right = (torch.linalg.qr(random_factors(r=4, seed=seed).lora_B).Q for seed in (0, 1))
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=torch.float64)
    result = singular_values(Factors(right.T, left, values.diag()))
    assert_close(result, values, rtol=1e9 * FLOAT64_EXACT, atol=0.0)


def test_nothing_dense_is_formed() -> None:
    features = 2**16
    x = random_factors(2, r=1, shape=(features, features), dtype=torch.float32)
    squared = torch.stack([tensor.double().square().sum((1, 2)) for tensor in x]).prod(0)
    error = 2 * norm_error(features, EPS_FLOAT32)
    assert_close(inner_product(x, x).double(), squared, rtol=error, atol=0.0)
    assert_close(pairwise_inner_products(x, x).diagonal(), squared, rtol=FLOAT64_EXACT, atol=0.0)
    assert_close(singular_values(x)[:, 0], squared.sqrt(), rtol=FLOAT64_EXACT, atol=0.0)


@pytest.mark.parametrize("function", [inner_product, pairwise_inner_products])
def test_shapes_must_agree(function: object) -> None:
    assert callable(function)
    message = "Updates of shape (7, 5) and (5, 7) have no inner product"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(random_factors(2, r=2), random_factors(2, r=2, shape=(5, 7)))
