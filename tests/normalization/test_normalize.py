"""Tests of matrix normalisation: values and gradients against the dense update, precision, layout, options."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.formulas import BOUNDED_NORMALIZATIONS, METHODS, NORMALIZATIONS, frobenius_norm_squared
from hyperadapt.normalization.normalize import normalize
from tests.support.dense_updates import (
    CASES,
    EACH,
    IN,
    OUT,
    WHITENING_A,
    R,
    core_update,
    dense_update,
    make_factors,
    tolerance,
    with_logits,
)
from tests.support.helpers import ROOT
from tests.support.tolerances import (
    FLOAT32_CONDITIONED,
    FLOAT32_FORMULA,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
)

parametrize_methods = pytest.mark.parametrize(("method", "options"), EACH, ids=str)
CHECK = {"rtol": FLOAT64_GRADCHECK, "atol": FLOAT64_GRADCHECK}


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_values_and_gradients_equal_the_dense_update(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(2, 3)
    options = with_logits(method, options, 2, 3)
    if "bound" in options:
        # One for each pair of factors.
        options = options | {"bound": options["bound"] * (1 + torch.rand(2, 3, dtype=torch.float64) / 10)}
    actual, expected = (function(lora_A, lora_B, method, **options) for function in (core_update, dense_update))
    assert_close(actual, expected, rtol=tolerance(method), atol=tolerance(method))
    direction = torch.randn_like(actual)
    gradients, expected_gradients = (
        torch.autograd.grad(update, (lora_A, lora_B), direction) for update in (actual, expected)
    )
    assert_close(gradients, expected_gradients, rtol=tolerance(method), atol=tolerance(method))


@parametrize_methods
def test_every_pair_of_a_batch_is_normalised_on_its_own(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(2, 2)
    options = with_logits(method, options, 2, 2)
    core = normalize(lora_A, lora_B, method, **options)
    assert core.shape == (2, 2, R, R)
    logits = {"logits": options["logits"][1, 0]} if "logits" in options else {}
    alone = normalize(lora_A[1, 0], lora_B[1, 0], method, **options | logits)
    assert alone.shape == (R, R)
    assert_close(core[1, 0], alone, rtol=tolerance(method), atol=tolerance(method))

    expected = torch.autograd.grad((lora_B @ core @ lora_A)[1, 0].sum(), (lora_A, lora_B))
    for gradient in expected:
        assert (gradient[1, 0] != 0).any()
        assert (gradient[0] == 0).all()
        assert (gradient[1, 1] == 0).all()
    for index in range(2):
        # The other factor is frozen.
        factors = [factor if place == index else factor.detach() for place, factor in enumerate((lora_A, lora_B))]
        update = core_update(*factors, method, **options)[1, 0]
        [gradient] = torch.autograd.grad(update.sum(), [factors[index]])
        assert_close(gradient, expected[index], rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    with torch.no_grad():
        assert not normalize(lora_A, lora_B, method, **options).requires_grad


@pytest.mark.parametrize(("method", "options"), [*EACH, WHITENING_A], ids=str)
def test_gradcheck(method: str, options: dict[str, Any]) -> None:
    options = with_logits(method, options, 2)
    assert torch.autograd.gradcheck(
        lambda A, B: core_update(A, B, method, **options), make_factors(2), fast_mode=False, **CHECK
    )


def test_the_default_options_are_as_documented() -> None:
    defaults = {
        "whitening": {"ridge": 1e-5, "factors": "both"},
        "sinkhorn": {"iterations": 20, "temperature": 1.0},
    }
    for method, options in defaults.items():
        given = with_logits(method, {}, 4)
        assert torch.equal(
            normalize(*make_factors(4), method, **given), normalize(*make_factors(4), method, **given, **options)
        )


def test_adaptive_is_soft_polar_with_the_bound_that_is_given() -> None:
    lora_A, lora_B = make_factors(2, 3)
    for bound in (2.0, 0.1 + torch.rand(2, 3, dtype=torch.float64)):
        adaptive, soft_polar = (normalize(lora_A, lora_B, name, bound=bound) for name in ("adaptive", "soft_polar"))
        assert torch.equal(adaptive, soft_polar)


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_gradients_reach_the_bound_of_each_position(method: str) -> None:
    lora_A, lora_B = (tensor.detach() for tensor in make_factors(2, 3))
    bound = (0.2 + torch.rand(2, 3, dtype=torch.float64) / 2).requires_grad_()

    def update(value: Tensor) -> Tensor:
        return core_update(lora_A, lora_B, method, bound=value)

    assert torch.autograd.gradcheck(update, (bound,), **CHECK)
    # Of its own position alone.
    [gradient] = torch.autograd.grad(update(bound)[1, 2].sum(), bound)
    assert [tuple(index) for index in gradient.nonzero().tolist()] == [(1, 2)]


@pytest.mark.parametrize("shape", [(2, 3, R, R), (R, R)])
def test_gradients_reach_the_mixing_logits(shape: tuple[int, ...]) -> None:
    lora_A, lora_B = (tensor.detach() for tensor in make_factors(2, 3))
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda value: core_update(lora_A, lora_B, "sinkhorn", logits=value, iterations=5), (logits,), **CHECK
    )


@pytest.mark.parametrize(
    ("method", "options", "dtype"),
    [
        *((method, options, torch.float32) for method, options in EACH),
        *(
            (method, {}, dtype)
            for method in ("whitening", "sinkhorn")
            for dtype in (torch.bfloat16, torch.float16, torch.float64)
        ),
    ],
    ids=str,
)
def test_half_precision_factors_get_a_float32_core(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    lora_A, lora_B = make_factors(4, dtype=dtype, seed=7)
    options = with_logits(method, options, 4)
    core = normalize(lora_A, lora_B, method, **options)
    assert core.dtype == expected
    # As if the given values were exact: no arithmetic in the lower precision.
    exact_A, exact_B = lora_A.detach().double().requires_grad_(), lora_B.detach().double().requires_grad_()
    for gram in (exact_A @ exact_A.mT, exact_B.mT @ exact_B):
        assert (torch.linalg.cond(gram) < 100).all()
    exact = normalize(exact_A, exact_B, method, **options)
    formula = FLOAT32_CONDITIONED if method == "whitening" else FLOAT32_FORMULA
    error = formula if expected == torch.float32 else tolerance(method)
    assert_close(core.double(), exact, rtol=error, atol=error)
    # Gradients come in the dtype of the factors, rounded to it once.
    update, exact_update = lora_B.double() @ core.double() @ lora_A.double(), exact_B @ exact @ exact_A
    direction = torch.randn_like(update)
    gradients = torch.autograd.grad(update, (lora_A, lora_B), direction)
    exact_gradients = torch.autograd.grad(exact_update, (exact_A, exact_B), direction)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        error_once = error + torch.finfo(dtype).eps
        assert_close(gradient.double(), exact_gradient, rtol=error_once, atol=error_once)


@parametrize_methods
def test_autocast_does_not_matter(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(4, dtype=torch.float32)
    options = with_logits(method, options, 4)
    expected = normalize(lora_A, lora_B, method, **options)
    with torch.autocast("cpu", torch.bfloat16):
        core = normalize(lora_A, lora_B, method, **options)
    assert core.dtype == torch.float32
    assert torch.equal(core, expected)


# Formulas read Gram matrices alone, which are always laid out in one way.
@pytest.mark.parametrize(
    ("method", "options"), [("soft_frobenius", {"bound": 2.0}), ("whitening", {}), ("sinkhorn", {})], ids=str
)
def test_memory_layout_does_not_matter(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(4)
    options = with_logits(method, options, 4)
    expected = core_update(lora_A, lora_B, method, **options)
    directions = {
        "contiguous": torch.randn_like(expected),
        "transposed": torch.randn_like(expected.mT).mT,
        "expanded": torch.randn(OUT, 1, dtype=torch.float64).expand_as(expected),
        "sliced": torch.randn(4, OUT, 2 * expected.shape[-1], dtype=torch.float64)[..., ::2],
    }
    strided_A = torch.empty(4, IN, R, dtype=torch.float64).mT.copy_(lora_A.detach()).requires_grad_()
    wide_B = torch.full((OUT, 4, 2 * R), math.nan, dtype=torch.float64)
    strided_B = wide_B[..., ::2].transpose(0, 1).copy_(lora_B.detach()).requires_grad_()
    assert not strided_A.is_contiguous()
    assert not strided_B.is_contiguous()
    actual = core_update(strided_A, strided_B, method, **options)
    assert_close(actual, expected, rtol=tolerance(method), atol=tolerance(method))
    for name, direction in directions.items():
        gradients = torch.autograd.grad(actual, (strided_A, strided_B), direction, retain_graph=True)
        dense = direction.contiguous()
        expected_gradients = torch.autograd.grad(expected, (lora_A, lora_B), dense, retain_graph=True)
        assert_close(
            gradients, expected_gradients, rtol=tolerance(method), atol=tolerance(method), msg=lambda m, n=name: n + m
        )


def test_the_squared_norm_is_that_of_the_product() -> None:
    lora_A, lora_B = make_factors(2)
    gram_A, gram_B = lora_A @ lora_A.mT, lora_B.mT @ lora_B
    squared = torch.linalg.matrix_norm(lora_B @ lora_A).square()
    assert_close(frobenius_norm_squared(gram_A, gram_B), squared, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize(
    ("shape_A", "shape_B"),
    [((3, 7), (5, 2)), ((2, 3, 7), (4, 5, 3)), ((3,), (5, 3))],
)
def test_factors_that_do_not_fit_are_refused(shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> None:
    message = re.escape(f"lora_A of shape {shape_A} and lora_B of shape {shape_B} do not fit: they must be (..., r")
    with pytest.raises(ValueError, match=message):
        normalize(torch.ones(shape_A), torch.ones(shape_B), "none")


def test_grams_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gram_A has shape \(2, 2\) but gram_B has shape \(3, 3\)"):
        frobenius_norm_squared(torch.eye(2), torch.eye(3))


@pytest.mark.parametrize("shape", [(R + 1, R + 1), (4, R)])
def test_logits_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    message = re.escape(f"logits of shape {shape} do not fit: with rank 3 they must be (..., 3, 3).")
    with pytest.raises(ValueError, match=message):
        normalize(*make_factors(4), "sinkhorn", logits=torch.zeros(shape))


MIXED = {"logits": torch.zeros(R, R)}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("spectrall", {}, "Unknown normalization 'spectrall'. Choose one of 'none', 'soft_frobenius'"),
        *(
            (
                method,
                {name: value},
                f"{name}={value!r} has no effect with normalization {method!r}, which takes {takes};",
            )
            for method, name, value, takes in (
                ("none", "bound", 1.0, "no options"),
                ("spectral", "ridge", 0.1, "no options"),
                ("whitening", "temperature", 0.5, "ridge, factors"),
                ("adaptive", "logits", [[0.0]], "bound"),
                ("sinkhorn", "ridge", 0.5, "iterations, temperature, logits"),
            )
        ),
        *(
            (
                method,
                {name: value for name, value in dict(EACH)[method].items() if name != need},
                f"normalization {method!r} needs {need}=; see the documentation of normalize.",
            )
            for method in NORMALIZATIONS
            for need in METHODS[method].needs
        ),
        *(
            (method, options | {name: value}, f"{name}={value!r} must be above 0.")
            for method, options, name in (
                ("soft_frobenius", {}, "bound"),
                ("whitening", {}, "ridge"),
                ("sinkhorn", MIXED, "temperature"),
                ("sinkhorn", MIXED, "iterations"),
            )
            for value in (0, math.nan)
        ),
        ("sinkhorn", MIXED | {"iterations": 2.5}, "iterations=2.5 must be an integer."),
        ("whitening", {"factors": "B"}, "factors='B' must be 'both' or 'A'."),
    ],
    ids=str,
)
def test_wrong_methods_and_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        normalize(*make_factors(), method, **options)


def test_the_documentation_lists_exactly_the_methods_of_the_config() -> None:
    table = (ROOT / "docs" / "normalization.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` ", table, flags=re.MULTILINE)
    assert tuple(documented) == NORMALIZATIONS
