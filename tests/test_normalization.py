"""Tests of matrix normalisation: values and gradients against the dense update, bounds, safety at zero."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperadapt import normalization
from hyperadapt.config import BOUNDED_NORMALIZATIONS, NORMALIZATIONS
from hyperadapt.normalization import core_from_grams, frobenius_norm_squared, gram_matrices, normalize
from tests.tolerances import (
    BFLOAT16_PRODUCT,
    EPS_FLOAT64,
    FLOAT32_FORMULA,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
    norm_error,
)

OUT, R, IN = 5, 3, 7
FORMULA = {
    torch.bfloat16: BFLOAT16_PRODUCT,
    torch.float32: FLOAT32_FORMULA,
    torch.float64: FLOAT64_EXACT,
}
Bound = float | Tensor | None


def make_factors(*leading: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    lora_A = torch.randn(*leading, R, IN, dtype=torch.float64)
    lora_B = torch.randn(*leading, OUT, R, dtype=torch.float64)
    return lora_A.to(dtype).requires_grad_(), lora_B.to(dtype).requires_grad_()


def dense_update(lora_A: Tensor, lora_B: Tensor, method: str, bound: Bound) -> Tensor:
    """The normalised update from the dense product, by each method's definition."""
    product = lora_B @ lora_A
    norm = torch.linalg.matrix_norm(product, keepdim=True)
    if bound is not None:
        bound = torch.as_tensor(bound, dtype=norm.dtype)[..., None, None]
    if method == "none":
        return product
    if method == "soft_frobenius":
        return product / torch.sqrt(1 + (norm / bound) ** 2)
    if method == "frobenius_clip":
        return product * (bound / norm).clamp(max=1)
    assert method == "frobenius"
    return product / norm


def core_update(lora_A: Tensor, lora_B: Tensor, method: str, bound: Bound) -> Tensor:
    return lora_B @ normalize(lora_A, lora_B, method, bound=bound).to(lora_A.dtype) @ lora_A


def any_bound(method: str, bound: float = 2.0) -> float | None:
    return bound if method in BOUNDED_NORMALIZATIONS else None


# The factors of seed 0 have norms of about √105 = 10: 1.5 clips them all, 100 none.
METHODS = [
    ("none", None),
    ("soft_frobenius", 8.0),
    ("frobenius_clip", 1.5),
    ("frobenius_clip", 100.0),
    ("frobenius", None),
]


@pytest.mark.parametrize(("method", "bound"), METHODS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize("tensor_bound", [False, True])
def test_values_and_gradients_equal_the_dense_update(
    method: str, bound: Bound, leading: tuple[int, ...], tensor_bound: bool
) -> None:
    lora_A, lora_B = make_factors(*leading)
    if bound is not None and tensor_bound:
        bound = bound * (1 + torch.rand(leading, dtype=torch.float64) / 10)
    actual = core_update(lora_A, lora_B, method, bound)
    expected = dense_update(lora_A, lora_B, method, bound)
    assert normalize(lora_A, lora_B, method, bound=bound).shape == (*leading, R, R)
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)

    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, (lora_A, lora_B), direction)
    expected_gradients = torch.autograd.grad(expected, (lora_A, lora_B), direction)
    torch.testing.assert_close(gradients, expected_gradients, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize(("method", "bound"), METHODS)
def test_gradcheck(method: str, bound: float | None) -> None:
    lora_A, lora_B = make_factors(2)
    assert torch.autograd.gradcheck(
        lambda A, B: core_update(A, B, method, bound),
        (lora_A, lora_B),
        rtol=FLOAT64_GRADCHECK,
        atol=FLOAT64_GRADCHECK,
    )


def test_gradients_reach_a_learned_bound() -> None:
    lora_A, lora_B = (tensor.detach() for tensor in make_factors(2))
    for method in BOUNDED_NORMALIZATIONS:
        bound = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda bound, method=method: core_update(lora_A, lora_B, method, bound),
            (bound,),
            rtol=FLOAT64_GRADCHECK,
            atol=FLOAT64_GRADCHECK,
        )


@pytest.mark.parametrize("method", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_zero_factors_have_finite_values_and_gradients(method: str, dtype: torch.dtype, zero: str) -> None:
    lora_A, lora_B = make_factors(2, dtype=dtype)
    with torch.no_grad():
        for name, tensor in (("A", lora_A), ("B", lora_B)):
            if zero in (name, "both"):
                tensor.zero_()
    core = normalize(lora_A, lora_B, method, bound=any_bound(method))
    expected = torch.zeros_like(core) if method == "frobenius" else torch.eye(R).expand_as(core).to(core)
    assert torch.equal(core, expected)

    update = lora_B @ core.to(dtype) @ lora_A
    direction = torch.randn_like(update)
    grad_A, grad_B = torch.autograd.grad(update, (lora_A, lora_B), direction)
    # The derivative of B·S·A at a product of zero is that of the plain product with a constant core.
    constant = core.detach().to(dtype)
    expected_gradients = (lora_B @ constant).mT @ direction, direction @ lora_A.mT @ constant.mT
    tolerance = FORMULA[dtype]
    torch.testing.assert_close((grad_A, grad_B), expected_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_bound_holds_and_huge_updates_approach_it(method: str, dtype: torch.dtype, scale: float) -> None:
    bound = torch.tensor([0.5, 9.0], dtype=torch.float64)
    lora_A, lora_B = make_factors(50, 2, dtype=dtype)
    A, B = scale * lora_A.detach(), scale * lora_B.detach()
    core = normalize(A, B, method, bound=bound.to(dtype).expand(50, 2))
    norms = torch.linalg.matrix_norm(B.double() @ core.double() @ A.double())
    error = norm_error(IN, torch.finfo(dtype).eps)
    assert (norms <= bound * (1 + error)).all()
    if scale > 1:
        assert (norms >= bound * (1 - error)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_unit_norm_is_one(dtype: torch.dtype, scale: float) -> None:
    lora_A, lora_B = (scale * tensor.detach() for tensor in make_factors(50, dtype=dtype))
    core = normalize(lora_A, lora_B, "frobenius").double()
    norms = torch.linalg.matrix_norm(lora_B.double() @ core @ lora_A.double())
    error = norm_error(IN, torch.finfo(dtype).eps)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=error)


@pytest.mark.parametrize(("method", "bound"), METHODS)
def test_rank_deficient_factors_equal_the_dense_update(method: str, bound: float | None) -> None:
    lora_A, lora_B = make_factors(2)
    with torch.no_grad():
        lora_A[:, 1] = lora_A[:, 0]
        lora_B[..., 2] = 0
    actual, expected = (function(lora_A, lora_B, method, bound) for function in (core_update, dense_update))
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    direction = torch.randn_like(actual)
    gradients, expected_gradients = (
        torch.autograd.grad(update, (lora_A, lora_B), direction) for update in (actual, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_half_precision_factors_get_a_float32_core(method: str) -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        lora_A, lora_B = make_factors(4, dtype=dtype)
        core = normalize(lora_A, lora_B, method, bound=any_bound(method))
        assert core.dtype == expected
        # As if the given values were exact: no arithmetic in the lower precision.
        exact = normalize(lora_A.double(), lora_B.double(), method, bound=any_bound(method))
        torch.testing.assert_close(core.double(), exact, rtol=FORMULA[expected], atol=0)


def test_a_nearly_cancelling_product_never_has_a_negative_squared_norm() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 1, IN), torch.randn(200, OUT, 1)
    lora_A = torch.cat([a, a + 1e-4 * torch.randn_like(a)], dim=1).requires_grad_()
    lora_B = torch.cat([b, -b + 1e-4 * torch.randn_like(b)], dim=2).requires_grad_()
    grams = gram_matrices(lora_A, lora_B)
    assert ((grams[0] * grams[1]).sum(dim=(-2, -1)) < 0).any(), "no case of this sample cancels"
    assert (frobenius_norm_squared(*grams) >= 0).all()
    for method in NORMALIZATIONS:
        update = core_update(lora_A, lora_B, method, any_bound(method))
        gradients = torch.autograd.grad(update.sum(), (lora_A, lora_B))
        assert all(tensor.isfinite().all() for tensor in (update, *gradients))


@pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)
def test_gradients_are_finite_where_the_norm_equals_the_bound(method: str) -> None:
    # ‖B·A‖ = 5 exactly; clipping takes the gradient of the inside there.
    lora_A = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    lora_B = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    core = normalize(lora_A, lora_B, method, bound=5.0)
    expected = 1.0 if method == "frobenius_clip" else math.sqrt(0.5)
    assert core.item() == pytest.approx(expected, rel=4 * EPS_FLOAT64)
    for gradient in torch.autograd.grad((lora_B @ core @ lora_A).sum(), (lora_A, lora_B)):
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


def test_gram_matrices_are_those_of_the_definition() -> None:
    lora_A, lora_B = make_factors(2)
    gram_A, gram_B = gram_matrices(lora_A, lora_B)
    torch.testing.assert_close(
        (gram_A, gram_B),
        (torch.einsum("tri,tsi->trs", lora_A, lora_A), torch.einsum("tor,tos->trs", lora_B, lora_B)),
        rtol=FLOAT64_EXACT,
        atol=FLOAT64_EXACT,
    )
    torch.testing.assert_close(
        frobenius_norm_squared(gram_A, gram_B),
        torch.linalg.matrix_norm(lora_B @ lora_A).square(),
        rtol=FLOAT64_EXACT,
        atol=FLOAT64_EXACT,
    )


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


@pytest.mark.parametrize(
    ("method", "bound", "message"),
    [
        ("spectrall", None, "Unknown normalization 'spectrall'. Choose one of 'none', 'soft_frobenius'"),
        ("soft_frobenius", None, "'soft_frobenius' needs a bound on the Frobenius norm; pass bound=."),
        ("frobenius_clip", None, "'frobenius_clip' needs a bound on the Frobenius norm; pass bound=."),
        ("none", 1.0, "bound=1.0 has no effect with normalization 'none'; drop it."),
        ("frobenius", 1.0, "bound=1.0 has no effect with normalization 'frobenius'; drop it."),
        ("soft_frobenius", 0, "bound=0 must be above 0."),
        ("frobenius_clip", -1.5, "bound=-1.5 must be above 0."),
        ("soft_frobenius", math.nan, "bound=nan must be above 0."),
    ],
)
def test_wrong_methods_and_bounds_are_refused(method: str, bound: Any, message: str) -> None:
    lora_A, lora_B = make_factors()
    with pytest.raises(ValueError, match=re.escape(message)):
        normalize(lora_A, lora_B, method, bound=bound)


def test_the_documentation_lists_exactly_the_methods_of_the_config() -> None:
    documented = re.findall(r"^\| `(\w+)` ", normalization.__doc__ or "", flags=re.MULTILINE)
    assert tuple(documented) == NORMALIZATIONS
