"""Tests of matrix normalisation: values and gradients against the dense update, precision, layout, options."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.formulas import CORES, frobenius_norm_squared
from hyperadapt.normalization.methods import BOUNDED_NORMALIZATIONS, NORMALIZATIONS
from hyperadapt.normalization.normalize import core_from_grams, gram_matrices, normalize
from tests.support.dense_updates import (
    CASES,
    IN,
    METHODS,
    OUT,
    R,
    core_update,
    dense_update,
    make_factors,
    tolerance,
    with_logits,
)
from tests.support.helpers import ROOT
from tests.support.tolerances import FLOAT32_CONDITIONED, FLOAT32_FORMULA, FLOAT64_EXACT, FLOAT64_GRADCHECK

parametrize_cases = pytest.mark.parametrize(("method", "options"), CASES, ids=str)
parametrize_methods = pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
CHECK = {"rtol": FLOAT64_GRADCHECK, "atol": FLOAT64_GRADCHECK}


@parametrize_cases
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize("tensors", [False, True])
def test_values_and_gradients_equal_the_dense_update(
    method: str, options: dict[str, Any], leading: tuple[int, ...], tensors: bool
) -> None:
    lora_A, lora_B = make_factors(*leading)
    options = with_logits(method, options, *leading)
    if tensors:
        # One bound and one strength for each pair of factors.
        options = options | {
            name: options[name] * (1 + torch.rand(leading, dtype=torch.float64) / 10)
            for name in ("bound", "strength")
            if name in options
        }
    actual, expected = (function(lora_A, lora_B, method, **options) for function in (core_update, dense_update))
    assert normalize(lora_A, lora_B, method, **options).shape == (*leading, R, R)
    assert_close(actual, expected, rtol=tolerance(method), atol=tolerance(method))

    direction = torch.randn_like(actual)
    gradients, expected_gradients = (
        torch.autograd.grad(update, (lora_A, lora_B), direction) for update in (actual, expected)
    )
    assert_close(gradients, expected_gradients, rtol=tolerance(method), atol=tolerance(method))


@pytest.mark.parametrize("method", ["polar", "whitening"])
def test_the_ridge_is_one_hundred_thousandth_by_default(method: str) -> None:
    factors = make_factors(4)
    assert torch.equal(normalize(*factors, method), normalize(*factors, method, ridge=1e-5))


def test_polar_is_the_orthogonal_part_of_the_products_svd() -> None:
    lora_A, lora_B = make_factors(4)
    left, _, right_h = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    expected = left[..., :R] @ right_h[..., :R, :]
    actual = core_update(lora_A, lora_B, "polar", ridge=1e-13)
    assert_close(actual, expected, rtol=tolerance("polar"), atol=tolerance("polar"))


@parametrize_cases
def test_gradcheck(method: str, options: dict[str, Any]) -> None:
    options = with_logits(method, options, 2)
    assert torch.autograd.gradcheck(
        lambda A, B: core_update(A, B, method, **options), make_factors(2), fast_mode=False, **CHECK
    )


@pytest.mark.parametrize(
    ("method", "name"), [*((method, "bound") for method in BOUNDED_NORMALIZATIONS), ("adaptive", "strength")]
)
def test_gradients_reach_learned_numbers_of_each_position(method: str, name: str) -> None:
    lora_A, lora_B = (tensor.detach() for tensor in make_factors(2, 3))
    learned = (0.2 + torch.rand(2, 3, dtype=torch.float64) / 2).requires_grad_()
    options = {"bound": 2.0} | ({"strength": 0.5} if method == "adaptive" else {})

    def update(value: Tensor) -> Tensor:
        return core_update(lora_A, lora_B, method, **(options | {name: value}))

    assert torch.autograd.gradcheck(update, (learned,), **CHECK)
    # Of its own position alone.
    [gradient] = torch.autograd.grad(update(learned)[1, 2].sum(), learned)
    assert [tuple(index) for index in gradient.nonzero().tolist()] == [(1, 2)]


@pytest.mark.parametrize("shape", [(2, 3, R, R), (R, R)])
def test_gradients_reach_the_mixing_logits(shape: tuple[int, ...]) -> None:
    lora_A, lora_B = (tensor.detach() for tensor in make_factors(2, 3))
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda value: core_update(lora_A, lora_B, "sinkhorn", logits=value, iterations=5), (logits,), **CHECK
    )


@parametrize_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_factors_get_a_float32_core(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    lora_A, lora_B = make_factors(4, dtype=dtype, seed=7)
    options = with_logits(method, options, 4)
    core = normalize(lora_A, lora_B, method, **options)
    assert core.dtype == expected
    # As if the given values were exact: no arithmetic in the lower precision.
    exact_A, exact_B = lora_A.detach().double().requires_grad_(), lora_B.detach().double().requires_grad_()
    for gram in gram_matrices(exact_A, exact_B):
        assert (torch.linalg.cond(gram) < 100).all()
    exact = normalize(exact_A, exact_B, method, **options)
    formula = FLOAT32_CONDITIONED if method in ("polar", "whitening") else FLOAT32_FORMULA
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


@parametrize_methods
def test_unused_cores_and_frozen_factors_get_no_gradient(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(4)
    options = with_logits(method, options, 4)
    expected = torch.autograd.grad(core_update(lora_A, lora_B, method, **options)[1].sum(), (lora_A, lora_B))
    for gradient in expected:
        assert (gradient[1] != 0).any()
        assert (gradient[[0, 2, 3]] == 0).all()
    for index in range(2):
        factors = [factor if place == index else factor.detach() for place, factor in enumerate((lora_A, lora_B))]
        [gradient] = torch.autograd.grad(core_update(*factors, method, **options)[1].sum(), [factors[index]])
        assert_close(gradient, expected[index], rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    with torch.no_grad():
        assert not normalize(lora_A, lora_B, method, **options).requires_grad


def test_gram_matrices_are_those_of_the_definition() -> None:
    lora_A, lora_B = make_factors(2)
    gram_A, gram_B = gram_matrices(lora_A, lora_B)
    expected = torch.einsum("tri,tsi->trs", lora_A, lora_A), torch.einsum("tor,tos->trs", lora_B, lora_B)
    assert_close((gram_A, gram_B), expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    squared = torch.linalg.matrix_norm(lora_B @ lora_A).square()
    assert_close(frobenius_norm_squared(gram_A, gram_B), squared, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize(
    ("shape_A", "shape_B"),
    [((3, 7), (5, 2)), ((2, 3, 7), (5, 3)), ((2, 3, 7), (4, 5, 3)), ((3,), (5, 3)), ((3, 7), (3,))],
)
def test_factors_that_do_not_fit_are_refused(shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> None:
    message = re.escape(f"lora_A of shape {shape_A} and lora_B of shape {shape_B} do not fit: they must be (..., r")
    with pytest.raises(ValueError, match=message):
        normalize(torch.ones(shape_A), torch.ones(shape_B), "none")


def test_grams_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gram_A has shape \(2, 2\) but gram_B has shape \(3, 3\)"):
        core_from_grams(torch.eye(2), torch.eye(3), "none")


@pytest.mark.parametrize("shape", [(R + 1, R + 1), (4, R, 1), (4, R)])
def test_logits_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    message = re.escape(f"logits of shape {shape} do not fit: with rank 3 they must be (..., 3, 3).")
    with pytest.raises(ValueError, match=message):
        normalize(*make_factors(4), "sinkhorn", logits=torch.zeros(shape))


# Of every method the tensor options or the bound, without which it cannot be called.
NEEDED: dict[str, dict[str, Any]] = {
    "soft_frobenius": {"bound": 1.0},
    "frobenius_clip": {"bound": 1.0},
    "adaptive": {"bound": 1.0, "strength": 0.5},
    "sinkhorn": {"logits": torch.zeros(R, R)},
}
TAKES = {
    "none": "no options",
    "soft_frobenius": "bound",
    "frobenius_clip": "bound",
    "adaptive": "bound, strength",
    "frobenius": "no options",
    "spectral": "no options",
    "schatten": "order",
    "polar": "ridge",
    "whitening": "ridge, factors",
    "weight_norm": "no options",
    "sinkhorn": "iterations, temperature, logits",
}
VALUES = {
    "bound": 1.0,
    "strength": 0.5,
    "ridge": 0.1,
    "factors": "A",
    "order": 4,
    "logits": [[0.0]],
    "iterations": 3,
    "temperature": 2.0,
}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("spectrall", {}, "Unknown normalization 'spectrall'. Choose one of 'none', 'soft_frobenius'"),
        *(
            (
                method,
                {name: value},
                f"{name}={value!r} has no effect with normalization {method!r}, which takes {takes}; ",
            )
            for method, takes in TAKES.items()
            for name, value in VALUES.items()
            if name not in takes.split(", ")
        ),
        *(
            (method, {}, f"normalization {method!r} needs {name}=; see the documentation of normalize.")
            for method, needed in NEEDED.items()
            for name in list(needed)[:1]
        ),
        ("adaptive", {"bound": 1.0}, "normalization 'adaptive' needs strength=; see"),
        ("adaptive", {"strength": 1.0}, "normalization 'adaptive' needs bound=; see"),
        *(
            (method, NEEDED.get(method, {}) | {name: value}, f"{name}={value!r} must be above 0.")
            for method, name in (
                ("soft_frobenius", "bound"),
                ("frobenius_clip", "bound"),
                ("adaptive", "bound"),
                ("polar", "ridge"),
                ("whitening", "ridge"),
                ("sinkhorn", "temperature"),
                ("sinkhorn", "iterations"),
            )
            for value in (0, -1.5, math.nan)
        ),
        ("sinkhorn", NEEDED["sinkhorn"] | {"iterations": 2.5}, "iterations=2.5 must be an integer."),
        *(
            ("adaptive", {"bound": 1.0, "strength": strength}, f"strength={strength!r} must be in [0, 1].")
            for strength in (-0.1, 1.5, math.nan)
        ),
        *(("schatten", {"order": p}, f"order={p!r} must be 2, 4, 8, 16 or 32.") for p in (0, 1, 3, 6, 64, "8")),
        *(("whitening", {"factors": f}, f"factors={f!r} must be 'both' or 'A'.") for f in ("B", "", "AB")),
    ],
    ids=str,
)
def test_wrong_methods_and_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        normalize(*make_factors(), method, **options)


def test_the_documentation_lists_exactly_the_methods_of_the_config() -> None:
    table = (ROOT / "docs" / "normalization.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` ", table, flags=re.MULTILINE)
    assert tuple(documented) == NORMALIZATIONS == tuple(CORES)
