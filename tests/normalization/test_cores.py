"""Cores by kernels, under Triton's interpreter or on a GPU, against the formulas in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.cores import cores
from hyperadapt.normalization.formulas import METHODS
from tests.support.dense_updates import EACH, WHITENING_A
from tests.support.kernels import INTERPRETED, NEEDS_KERNELS, PLACE, let_kernels_serve
from tests.support.tolerances import FLOAT32_CONDITIONED, FLOAT32_FORMULA

KERNEL_METHODS = [(name, options) for name, options in [*EACH, WHITENING_A] if METHODS[name].kernel]
# Widths of A and of B of two groups with two positions and one, and two tasks.
SHAPES = [(2, 48, 32), (1, 21, 70)]
TASKS, POSITIONS = 2, 3


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for float32 wherever tensors are, whose outputs are NaN where nothing is written."""
    if INTERPRETED:
        let_kernels_serve(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(method: str, options: dict[str, Any], r: int) -> dict[str, list[Tensor]]:
    """Random factors in float64, and what the method reads beside them, by position."""
    torch.manual_seed(0)
    inputs: dict[str, list[Tensor]] = {"A": [], "B": []}
    for count, inside, out in SHAPES:
        for name, width in (("A", inside), ("B", out)):
            inputs[name].append(torch.randn(TASKS, count, r, width, dtype=torch.float64) / width**0.5)
    if "bound" in options:
        # Some singular values are above bound/√r, some below.
        inputs["bound"] = [options["bound"] * (0.5 + torch.rand(POSITIONS, dtype=torch.float64))]
    if "logits" in METHODS[method].needs:
        inputs["logits"] = [torch.randn(TASKS, POSITIONS, r, r, dtype=torch.float64)]
    return inputs


def core_and_gradients(
    method: str, options: dict[str, Any], inputs: dict[str, list[Tensor]], dtype: torch.dtype, place: str
) -> tuple[Tensor, list[Tensor]]:
    """The core of inputs rounded to a dtype, and the gradients of all that the core depends on."""
    given = {
        name: [
            tensor.to(place, dtype if name in "AB" else torch.promote_types(dtype, torch.float32)) for tensor in some
        ]
        for name, some in inputs.items()
    }
    leaves = [tensor.requires_grad_() for some in given.values() for tensor in some]
    named = {name: given[name][0] for name in ("bound", "logits") if name in given}
    core = cores(given["A"], given["B"], METHODS[method], options | named)
    torch.manual_seed(1)
    direction = torch.randn(core.shape, dtype=torch.float64).to(core)
    gradients = torch.autograd.grad(core, leaves, direction, allow_unused=True, materialize_grads=True)
    return core.detach(), list(gradients)


def round_inputs(inputs: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The inputs as a run in a dtype reads them."""
    kinds = {name: dtype if name in "AB" else torch.float32 for name in inputs}
    return {name: [tensor.to(kinds[name]).double() for tensor in some] for name, some in inputs.items()}


@NEEDS_KERNELS
@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.parametrize(("method", "options"), KERNEL_METHODS, ids=str)
def test_kernels_equal_the_formulas(method: str, options: dict[str, Any], r: int) -> None:
    check_against_float64(method, options, r, torch.float32)


@NEEDS_KERNELS
@pytest.mark.parametrize("r", [32, 64])
@pytest.mark.parametrize(("method", "options"), KERNEL_METHODS, ids=str)
def test_kernels_of_large_ranks(method: str, options: dict[str, Any], r: int) -> None:
    check_against_float64(method, options, r, torch.float32)


@NEEDS_KERNELS
def test_kernels_equal_the_formula_in_half_precision() -> None:
    check_against_float64("soft_frobenius", {"bound": 2.0}, 5, torch.float16)


def check_against_float64(method: str, options: dict[str, Any], r: int, dtype: torch.dtype) -> None:
    inputs = round_inputs(make_inputs(method, options, r), dtype)
    core, gradients = core_and_gradients(method, options, inputs, dtype, PLACE)
    exact, exact_gradients = core_and_gradients(method, options, inputs, torch.float64, "cpu")
    assert core.dtype == torch.float32
    # Inverse square roots multiply rounding with the condition of a Gram matrix.
    error = FLOAT32_CONDITIONED if method == "whitening" else FLOAT32_FORMULA
    assert_close(core.cpu().double(), exact, rtol=error, atol=error * float(exact.abs().max()))
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        limit = (error + torch.finfo(dtype).eps) * float(wanted.abs().max())
        assert_close(gradient.cpu().double(), wanted, rtol=error, atol=limit)
