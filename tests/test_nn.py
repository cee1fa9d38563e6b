"""Normalisation of any weight matrix through parametrize, and whitening of activations."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import hyperadapt
from hyperadapt.nn import MatrixNorm, Whitening
from hyperadapt.normalization import NORMALIZATIONS
from hyperadapt.normalization.formulas import METHODS
from tests.support.dense_updates import dense_update
from tests.support.tolerances import (
    FLOAT32_FORMULA,
    FLOAT64_CONDITIONED,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
    RIDGE,
    SINKHORN_SUM,
)


def make(method: str, **options: object) -> MatrixNorm:
    bound = {"bound": 1.5} if METHODS[method].is_bounded else {}
    return MatrixNorm(method, **bound, **options).double()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "logits" not in method.needs])
def test_a_matrix_is_normalised_by_the_methods_definition(method: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ridge = {"ridge": RIDGE} if "ridge" in METHODS[method].options else {}
    norm, weight = make(method, **ridge), torch.randn(shape, dtype=torch.float64)
    # The product of the matrix and the smaller identity; a learned bound starts at sigmoid(2) of the given one.
    identity = torch.eye(min(shape), dtype=torch.float64)
    factors = (weight, identity) if shape[0] <= shape[1] else (identity, weight)
    bound = 1.5 / (1 + math.exp(-2)) if method == "adaptive" else 1.5
    expected = dense_update(*factors, method, bound=bound, **ridge)
    assert_close(norm(weight), expected, rtol=FLOAT64_CONDITIONED, atol=FLOAT64_CONDITIONED)


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_a_batch_equals_its_matrices_and_gradients_are_right(method: str) -> None:
    torch.manual_seed(0)
    norm = make(method)
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    together = norm(weight)
    for index in ((0, 0), (1, 2)):
        assert_close(together[index], norm(weight[index]), rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    assert torch.autograd.gradcheck(norm, (weight[0, :2].detach().requires_grad_(),), atol=FLOAT64_GRADCHECK)


def test_sinkhorn_makes_a_square_matrix_doubly_stochastic() -> None:
    torch.manual_seed(0)
    mixed = make("sinkhorn")(torch.randn(6, 6))
    assert_close(mixed.sum(0), torch.ones(6), rtol=0, atol=SINKHORN_SUM)
    assert_close(mixed.sum(1), torch.ones(6), rtol=0, atol=SINKHORN_SUM)
    assert (mixed > 0).all()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_whitening_gives_the_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, *shape, dtype=torch.float64)
    left, _, right_h = torch.linalg.svd(weight, full_matrices=False)
    actual = make("whitening", ridge=RIDGE)(weight)
    assert_close(actual, left @ right_h, rtol=0, atol=FLOAT64_CONDITIONED)


def test_as_a_parametrization_it_trains_and_can_be_made_permanent() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    parametrize.register_parametrization(layer, "weight", hyperadapt.nn.MatrixNorm("spectral", start_dim=1))
    x = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        assert_close(
            torch.linalg.matrix_norm(layer.weight.flatten(1), 2), torch.tensor(1.0), rtol=FLOAT32_FORMULA, atol=0
        )
        before = layer.weight.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(layer.weight, before)
    expected = copy.deepcopy(layer)(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), expected)


def test_adaptive_learns_a_bound_below_the_given_one() -> None:
    norm, weight = MatrixNorm("adaptive", bound=2.0), 1e4 * torch.randn(4, 4)
    norms = []
    for logit in (-2.0, 0.0, 50.0):
        nn.init.constant_(norm.bound_logit, logit)
        norms.append(torch.linalg.matrix_norm(norm(weight)))
    expected = torch.tensor([1.0, 2 / (1 + math.exp(-2)), 2.0])
    assert_close(torch.stack(norms), expected, rtol=FLOAT32_FORMULA, atol=0)
    assert [name for name, _ in norm.named_parameters()] == ["bound_logit"]
    norms[1].backward()
    assert norm.bound_logit.grad > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    for method in NORMALIZATIONS:
        assert make(method).float()(torch.randn(4, 4).to(dtype)).dtype == dtype
    assert Whitening(4)(torch.randn(9, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_autocast_does_not_matter(method: str) -> None:
    torch.manual_seed(0)
    norm, x = make(method).float(), torch.randn(6, 6)
    expected = norm(x), Whitening(6)(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = norm(x), Whitening(6)(x)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "frobenious"}, "Unknown normalization 'frobenious'.*'frobenius'"),
        ({"method": "spectral", "bound": 1.0}, "bound=1.0 has no effect with normalization 'spectral'"),
        ({"method": "soft_frobenius"}, "'soft_frobenius' needs a bound.*pass bound="),
        ({"method": "adaptive", "bound": 1.0, "ridge": 0.5}, "ridge=0.5 has no effect with .*takes bound; drop"),
        ({"method": "whitening", "ridge": -1.0}, "ridge=-1.0 must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixNorm(**arguments)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"square matrix, but the weight is of shape \(3, 4\)"):
        MatrixNorm("sinkhorn")(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"Whitening\(4\) got an input of shape \(9, 3\)"):
        Whitening(4)(torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"at least 2 samples.*\(1, 4\)"):
        Whitening(4)(torch.randn(1, 4))


def test_whitened_activations_have_zero_mean_and_unit_covariance() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(4, 50, 5, dtype=torch.float64) @ mixing + 3
    whitening = Whitening(5, ridge=RIDGE, momentum=1.0).double()
    y = whitening(x).reshape(-1, 5)
    assert_close(y.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=FLOAT64_CONDITIONED)
    assert_close(y.mT.cov(), torch.eye(5, dtype=torch.float64), rtol=0, atol=FLOAT64_CONDITIONED)
    whitening.eval()
    # With momentum 1 the running averages are the batch's.
    assert_close(whitening(x).reshape(-1, 5), y, rtol=FLOAT64_EXACT, atol=FLOAT64_CONDITIONED)


def test_whitening_has_right_and_finite_gradients() -> None:
    torch.manual_seed(0)
    whitening = Whitening(3).double()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(whitening, (x,), atol=FLOAT64_GRADCHECK)
    # Equal variances without correlation repeat an eigenvalue, and a constant feature makes the covariance singular.
    tied = torch.tensor([[1.0, 0, 5], [-1, 0, 5], [0, 1, 5], [0, -1, 5]], requires_grad=True)
    y = Whitening(3)(tied)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert tied.grad is not None
    assert tied.grad.isfinite().all()
