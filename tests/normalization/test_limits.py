"""Tests of matrix normalisation at its limits: bounds, unit norms, zero, lost rank, repeated spectra, scales."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.formulas import (
    BOUNDED_NORMALIZATIONS,
    METHODS,
    UNIT_NORMALIZATIONS,
    frobenius_norm_squared,
)
from hyperadapt.normalization.normalize import normalize
from tests.support.dense_updates import (
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
from tests.support.tolerances import (
    BFLOAT16_PRODUCT,
    EPS_FLOAT32,
    EPS_FLOAT64,
    FLOAT32_FORMULA,
    FLOAT64_CONDITIONED,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
    RIDGE,
    RIDGED_RANK_DEFICIENT,
    lost_rank_error,
    norm_error,
)

FORMULA = {torch.bfloat16: BFLOAT16_PRODUCT, torch.float32: FLOAT32_FORMULA, torch.float64: FLOAT64_EXACT}
EACH_AND_A = [*EACH, WHITENING_A]
UNIT = [(method, options) for method, options in EACH if method in UNIT_NORMALIZATIONS]
parametrize_methods = pytest.mark.parametrize(("method", "options"), EACH_AND_A, ids=str)
parametrize_unit = pytest.mark.parametrize(("method", "options"), UNIT, ids=str)
parametrize_bounded = pytest.mark.parametrize("method", BOUNDED_NORMALIZATIONS)


def singular_values(update: Tensor) -> Tensor:
    return torch.linalg.svdvals(update)[..., :R]


def gradients(value: Tensor, factors: tuple[Tensor, Tensor], direction: Tensor | None = None) -> tuple[Tensor, ...]:
    direction = torch.ones_like(value) if direction is None else direction
    return torch.autograd.grad(value, factors, direction, retain_graph=True, materialize_grads=True)


@parametrize_bounded
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1.0), (torch.float32, 1e4)])
def test_the_bound_holds_and_huge_updates_approach_it(method: str, dtype: torch.dtype, scale: float) -> None:
    bound = torch.tensor([0.5, 9.0], dtype=torch.float64)
    lora_A, lora_B = make_factors(50, 2, dtype=dtype)
    A, B = scale * lora_A.detach(), scale * lora_B.detach()
    core = normalize(A, B, method, bound=bound.to(dtype).expand(50, 2))
    norms = torch.linalg.matrix_norm(B.double() @ core.double() @ A.double())
    # Of a norm; single singular values have the Gram matrices' error times the condition of these.
    error = FORMULA[dtype] if METHODS[method].bounds_singular_values else norm_error(IN, torch.finfo(dtype).eps)
    assert (norms <= bound * (1 + error)).all()
    if scale > 1:
        assert (norms >= bound * (1 - error)).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("deficient", [False, True])
def test_soft_polar_bounds_every_singular_value_softly(scale: float, deficient: bool) -> None:
    lora_A, lora_B = rank_deficient_factors() if deficient else make_factors(2)
    lora_A, lora_B = lora_A.detach(), scale * lora_B.detach()
    c = 2 / math.sqrt(R)
    sigma = singular_values(lora_B @ lora_A)
    # Values that are zero but for rounding are bounded like others.
    sigma = torch.where(sigma > EPS_FLOAT64 * 100 * sigma[..., :1], sigma, 0)
    actual = singular_values(core_update(lora_A, lora_B, "soft_polar", bound=2.0))
    # In a lost direction the core is 1 beside c/σ in others, and a rounding there counts in units of σ.
    error = FLOAT64_CONDITIONED + (EPS_FLOAT64 * 100 * float(sigma.max()) if deficient else 0)
    assert_close(actual, sigma / torch.sqrt(1 + (sigma / c) ** 2), rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lost", ["A", "B", "AB"])
def test_soft_polar_keeps_the_bound_of_updates_of_any_size_where_rank_is_lost(lost: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    r = 8
    rows = {
        name: torch.randn(3, r, width, dtype=torch.float64) / width**0.5 for name, width in (("A", 256), ("B", 192))
    }
    for name in lost:
        # Not by a power of 2, so that it is lost but for rounding.
        rows[name][:, -2:] = 1.37 * rows[name][:, :2]
    lora_A, lora_B = rows["A"].to(dtype), rows["B"].mT
    for scale in (1e5, 1e7, 1e9, 1e13):
        B = (scale * lora_B).to(dtype)
        core = normalize(lora_A, B, "soft_polar", bound=2.0)
        largest = torch.linalg.svdvals(B.double() @ core.double() @ lora_A.double())[..., 0]
        assert_close(largest, torch.full_like(largest, 2 / math.sqrt(r)), rtol=lost_rank_error(r, dtype), atol=0)


def test_soft_polar_is_the_identity_near_zero_to_second_order() -> None:
    lora_A, lora_B = make_factors(4)
    c, size = 2 / math.sqrt(R), torch.linalg.matrix_norm(lora_B @ lora_A, ord=2)
    for scale in (1e-2, 1e-4, 1e-9):
        product = scale * lora_B @ lora_A
        change = torch.linalg.matrix_norm(core_update(lora_A, scale * lora_B, "soft_polar", bound=2.0) - product, ord=2)
        # σ - σ/√(1 + σ²/c²) < σ³/(2c²), and nearly that.
        most = (scale * size) ** 3 / (2 * c**2)
        rounding = FLOAT64_EXACT * scale * size
        assert (change <= most + rounding).all()
        assert (change >= most * (1 - (scale * size / c) ** 2) - rounding).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [case for case in EACH if case[0] not in ("whitening", "weight_norm", "sinkhorn")],
    ids=str,
)
def test_the_update_depends_on_the_product_of_its_factors_alone(method: str, options: dict[str, Any]) -> None:
    factors = make_factors(3)
    torch.manual_seed(5)
    change = torch.eye(R, dtype=torch.float64) + torch.randn(3, R, R, dtype=torch.float64) / 4
    changed = torch.linalg.solve(change, factors[0]), factors[1] @ change
    actual, expected = (core_update(A, B, method, **options) for A, B in (changed, factors))
    assert_close(actual, expected, rtol=FLOAT64_CONDITIONED, atol=FLOAT64_CONDITIONED)
    direction = torch.randn_like(expected)
    for value, wanted in zip(
        gradients(actual, factors, direction), gradients(expected, factors, direction), strict=True
    ):
        assert_close(value, wanted, rtol=FLOAT64_CONDITIONED, atol=FLOAT64_CONDITIONED)


@parametrize_bounded
def test_bounded_methods_neither_overflow_nor_underflow(method: str) -> None:
    for scale in (1e-18, 1e-12, 1e-8, 1e8):
        lora_A, lora_B = ((scale * t).detach().requires_grad_() for t in make_factors(3, dtype=torch.float32))
        core = normalize(lora_A, lora_B, method, bound=2.0)
        update = lora_B @ core @ lora_A
        actual = gradients(update, (lora_A, lora_B), torch.randn_like(update))
        assert all(tensor.isfinite().all() for tensor in (update, *actual))
        if scale < 1:
            assert_close(core, torch.eye(R).expand_as(core), rtol=0, atol=EPS_FLOAT32)
            assert all((tensor != 0).all() for tensor in actual)
        else:
            bounded = torch.linalg.matrix_norm(lora_B.double() @ core.double() @ lora_A.double())
            assert_close(bounded, torch.full_like(bounded, 2.0), rtol=FLOAT32_FORMULA, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
@parametrize_methods
def test_what_is_not_finite_is_passed_on(method: str, options: dict[str, Any], place: int, bad: float) -> None:
    factors = [factor.detach() for factor in make_factors(2)]
    factors[place][1, 0, 0] = bad
    update = core_update(*(factor.requires_grad_() for factor in factors), method, **with_logits(method, options, 2))
    assert update[0].isfinite().all()
    assert not update[1].isfinite().all()
    for gradient in torch.autograd.grad(update.sum(), factors):
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-4), (torch.float64, 1.0), (torch.float32, 1e4)])
def test_the_unit_norm_is_one(dtype: torch.dtype, scale: float) -> None:
    lora_A, lora_B = (scale * tensor.detach() for tensor in make_factors(50, dtype=dtype))
    core = normalize(lora_A, lora_B, "frobenius").double()
    norms = torch.linalg.matrix_norm(lora_B.double() @ core @ lora_A.double())
    error = norm_error(IN, torch.finfo(dtype).eps)
    assert_close(norms, torch.ones_like(norms), rtol=0, atol=error)


def test_singular_values_are_as_documented() -> None:
    factors = make_factors(50)
    spectral, whitening, white_A = (
        singular_values(core_update(*factors, method, **options))
        for method, options in (
            ("spectral", {}),
            ("whitening", {"ridge": RIDGE}),
            ("whitening", {"ridge": RIDGE, "factors": "A"}),
        )
    )
    ones = torch.ones_like(spectral)
    assert_close(spectral[:, 0], ones[:, 0], rtol=0, atol=FLOAT64_EXACT)
    assert_close(whitening, ones, rtol=0, atol=FLOAT64_CONDITIONED)
    assert_close(white_A, singular_values(factors[1]), rtol=FLOAT64_CONDITIONED, atol=0)
    for method, options in UNIT:
        update = core_update(*factors, method, **with_logits(method, options, 50))
        largest_norm = METHODS[method].largest_norm(R)
        assert (torch.linalg.matrix_norm(update) <= largest_norm * (1 + FLOAT64_EXACT)).all(), method


@parametrize_unit
def test_the_scale_of_the_factors_does_not_matter(method: str, options: dict[str, Any]) -> None:
    lora_A, lora_B = make_factors(3)
    options = with_logits(method, options, 3)
    expected = core_update(lora_A, lora_B, method, **options)
    # Powers of 2 scale without rounding, so that only the smallest numbers could be different.
    for scale_A, scale_B in ((2.0**10, 2.0**-30), (2.0**-20, 2.0**-20), (2.0**30, 2.0**30)):
        A, B = (scale_A * lora_A).detach().requires_grad_(), (scale_B * lora_B).detach().requires_grad_()
        actual = core_update(A, B, method, **options)
        assert_close(actual, expected, rtol=tolerance(method), atol=tolerance(method))
        direction = torch.randn_like(actual)
        scaled = tuple(s * g for s, g in zip((scale_A, scale_B), gradients(actual, (A, B), direction), strict=True))
        unscaled = gradients(expected, (lora_A, lora_B), direction)
        assert_close(scaled, unscaled, rtol=tolerance(method), atol=tolerance(method))


def test_whitening_of_a_alone_keeps_the_scale_of_b() -> None:
    lora_A, lora_B = make_factors(3)
    expected = core_update(lora_A, lora_B, "whitening", factors="A")
    actual = core_update(2.0**10 * lora_A, 4 * lora_B, "whitening", factors="A")
    assert_close(actual, 4 * expected, rtol=FLOAT64_CONDITIONED, atol=FLOAT64_CONDITIONED)


@parametrize_unit
def test_gradients_do_not_overflow_where_the_scale_is_extreme(method: str, options: dict[str, Any]) -> None:
    options = with_logits(method, options, 3)
    for scale in (1e-18, 1e-12, 1e-8, 1e8):
        lora_A, lora_B = ((scale * t).detach().requires_grad_() for t in make_factors(3, dtype=torch.float32))
        update = core_update(lora_A, lora_B, method, **options)
        direction = torch.randn_like(update)
        actual = [scale * gradient for gradient in gradients(update, (lora_A, lora_B), direction)]
        assert all(tensor.isfinite().all() for tensor in (update, *actual))
        are_zero = [bool((tensor == 0).all()) for tensor in (update, *actual)]
        # Where f² is below the normal numbers of float32, 1.2e-38, what reads f² counts the update as zero.
        if scale**4 < 1e-40 and method not in ("spectral", "whitening", "weight_norm", "sinkhorn"):
            assert all(are_zero)
        else:
            assert not any(are_zero)


@parametrize_unit
def test_at_rank_one_all_unit_norms_are_the_same(method: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(4, 1, IN, dtype=torch.float64), torch.randn(4, OUT, 1, dtype=torch.float64)
    options = options | ({"logits": torch.randn(4, 1, 1)} if "logits" in METHODS[method].needs else {})
    options = options | ({"ridge": RIDGE} if "ridge" in METHODS[method].options else {})
    actual = core_update(lora_A, lora_B, method, **options)
    expected = METHODS[method].largest_norm(1) * dense_update(lora_A, lora_B, "frobenius")
    assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@parametrize_methods
@pytest.mark.parametrize(
    ("dtype", "zero"), [(torch.float64, "A"), (torch.float32, "B"), (torch.bfloat16, "both")], ids=str
)
def test_zero_factors_have_finite_values_and_gradients(
    method: str, options: dict[str, Any], dtype: torch.dtype, zero: str
) -> None:
    lora_A, lora_B = make_factors(2, dtype=dtype)
    with torch.no_grad():
        for name, tensor in (("A", lora_A), ("B", lora_B)):
            if zero in (name, "both"):
                tensor.zero_()
    core = normalize(lora_A, lora_B, method, **with_logits(method, options, 2))
    if (method, options) == WHITENING_A and zero == "B":
        assert (singular_values(core) > 0).all()
    elif method in UNIT_NORMALIZATIONS:
        assert (core == 0).all()
    else:
        assert torch.equal(core, torch.eye(R).expand_as(core).to(core))

    update = lora_B @ core.to(dtype) @ lora_A
    direction = torch.randn_like(update)
    # The derivative of B·S·A at a product of zero is that of the plain product with a constant core.
    constant = core.detach().to(dtype)
    expected = (lora_B @ constant).mT @ direction, direction @ lora_A.mT @ constant.mT
    assert_close(gradients(update, (lora_A, lora_B), direction), expected, rtol=FORMULA[dtype], atol=FORMULA[dtype])
    # The core's own gradients, which the zero product hides.
    if core.requires_grad:
        for gradient in gradients(core, (lora_A, lora_B), torch.randn_like(core)):
            assert gradient.isfinite().all()


def rank_deficient_factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A with two equal rows in all pairs, and B with a zero column in the second."""
    lora_A, lora_B = make_factors(2, dtype=dtype)
    with torch.no_grad():
        lora_A[:, 1] = lora_A[:, 0]
        lora_B[1, :, 2] = 0
    return lora_A, lora_B


@parametrize_methods
def test_rank_deficient_factors(method: str, options: dict[str, Any]) -> None:
    options = with_logits(method, options, 2)
    factors = rank_deficient_factors(torch.float32)
    update = core_update(*factors, method, **options)
    assert all(tensor.isfinite().all() for tensor in (update, *gradients(update, factors, torch.randn_like(update))))
    if tolerance(method) != FLOAT64_EXACT:
        return
    factors = rank_deficient_factors()
    actual, expected = (function(*factors, method, **options) for function in (core_update, dense_update))
    assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    direction = torch.randn_like(actual)
    actual_gradients, expected_gradients = (gradients(update, factors, direction) for update in (actual, expected))
    if method in ("weight_norm", "sinkhorn"):
        # A zero column has no direction, hence the gradient 0 here; the dense formula's is huge.
        assert (actual_gradients[1][1, :, 2] == 0).all()
        expected_gradients[1][1, :, 2] = 0
    assert_close(actual_gradients, expected_gradients, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


@pytest.mark.parametrize("r", [4, 16, 64])
def test_whitening_keeps_directions_below_what_rounding_leaves_of_zero(r: int) -> None:
    torch.manual_seed(0)
    rotations = [torch.linalg.qr(torch.randn(96, r, dtype=torch.float64))[0] for _ in range(2)]
    values = torch.logspace(0, -4, r, dtype=torch.float64)
    # In float32 they are the same numbers.
    factors = [(values * rotation).float() for rotation in rotations]
    direction = torch.randn(96, 96, dtype=torch.float64)

    def update_and_gradients(dtype: torch.dtype) -> list[Tensor]:
        lora_B, lora_A = (factor.to(dtype).requires_grad_() for factor in factors)
        update = lora_B @ normalize(lora_A.mT, lora_B, "whitening").to(dtype) @ lora_A.mT
        return [update, *torch.autograd.grad(update, (lora_A, lora_B), direction.to(dtype))]

    for actual, exact in zip(update_and_gradients(torch.float32), update_and_gradients(torch.float64), strict=True):
        assert torch.linalg.matrix_norm(actual.double() - exact) < 0.03 * torch.linalg.matrix_norm(exact)


def test_whitened_updates_of_rank_deficient_factors_lose_only_the_lost_direction() -> None:
    lora_A, lora_B = (factor[0] for factor in rank_deficient_factors())

    def orthogonal_part(matrix: Tensor, rank: int) -> Tensor:
        left, values, right_h = torch.linalg.svd(matrix, full_matrices=False)
        assert (values[rank:] < FLOAT64_EXACT).all()
        return left[:, :rank] @ right_h[:rank]

    whitening = core_update(lora_A, lora_B, "whitening", ridge=RIDGE)
    expected = orthogonal_part(lora_B, 3) @ orthogonal_part(lora_A, 2)
    assert_close(whitening, expected, rtol=0, atol=RIDGED_RANK_DEFICIENT)


@pytest.mark.parametrize(
    ("method", "options", "rotated"),
    [
        *((method, options, False) for method, options in EACH_AND_A),
        *((method, options, True) for method, options in (("spectral", {}), ("whitening", {}))),
    ],
    ids=str,
)
def test_repeated_singular_values_have_the_right_gradient(method: str, options: dict[str, Any], rotated: bool) -> None:
    torch.manual_seed(0)
    # Exactly tied: unit matrices; tied up to rounding: random orthogonal ones.
    orthogonal_A, orthogonal_B = torch.eye(R, IN).double(), torch.eye(OUT, R).double()
    if rotated:
        orthogonal_A, orthogonal_B = (torch.linalg.qr(torch.randn(n, R).double())[0] for n in (IN, OUT))
        orthogonal_A = orthogonal_A.mT
    factors = (3 * orthogonal_A).requires_grad_(), (2 * orthogonal_B).requires_grad_()
    options = with_logits(method, options)
    update = core_update(*factors, method, **options)
    assert all(tensor.isfinite().all() for tensor in (update, *gradients(update, factors)))
    if method != "spectral":
        # The spectral norm alone has a kink here.
        assert torch.autograd.gradcheck(
            lambda A, B: core_update(A, B, method, **options), factors, rtol=FLOAT64_GRADCHECK, atol=FLOAT64_GRADCHECK
        )


def test_a_nearly_cancelling_product_never_has_a_negative_squared_norm() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 1, IN), torch.randn(200, OUT, 1)
    factors = (
        torch.cat([a, a + 1e-4 * torch.randn_like(a)], dim=1).requires_grad_(),
        torch.cat([b, -b + 1e-4 * torch.randn_like(b)], dim=2).requires_grad_(),
    )
    lora_A, lora_B = factors
    grams = lora_A @ lora_A.mT, lora_B.mT @ lora_B
    assert ((grams[0] * grams[1]).sum(dim=(-2, -1)) < 0).any(), "no case of this sample cancels"
    assert (frobenius_norm_squared(*grams) >= 0).all()
    for method, options in EACH_AND_A:
        given = options | ({"logits": torch.randn(2, 2)} if "logits" in METHODS[method].needs else {})
        update = core_update(*factors, method, **given)
        assert all(tensor.isfinite().all() for tensor in (update, *gradients(update, factors))), method


@parametrize_bounded
def test_gradients_are_finite_where_the_norm_equals_the_bound(method: str) -> None:
    # ‖B·A‖ = 5 exactly.
    lora_A = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    lora_B = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    core = normalize(lora_A, lora_B, method, bound=5.0)
    assert core.item() == pytest.approx(math.sqrt(0.5), rel=4 * EPS_FLOAT64)
    for gradient in gradients(lora_B @ core @ lora_A, (lora_A, lora_B)):
        assert gradient.isfinite().all()
        assert (gradient != 0).all()
