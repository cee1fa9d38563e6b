"""Tests of applying generated factors to activations, against the dense product."""

import pytest
import torch
from torch import Tensor

from hyperadapt.hypernetwork.factors import Factors
from tests.support.tolerances import FLOAT32_FORMULA, FLOAT64_EXACT

TASKS, R, IN, OUT = 3, 2, 6, 5


def make_factors(tasks: int = TASKS, dtype: torch.dtype = torch.float64, core: int = R) -> Factors:
    torch.manual_seed(0)
    shapes = ((tasks, R, IN), (tasks, OUT, R), (tasks, core, core))
    return Factors(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def dense_apply(factors: Factors, x: Tensor, rows: list[int]) -> Tensor:
    """One dense product per element of the first dimension; the row's task is given for each."""
    # A core of one number is a multiple of the identity.
    core = factors.core if factors.core.shape[-1] == R else factors.core * torch.eye(R, dtype=factors.core.dtype)
    weights = torch.einsum("tor,trs,tsi->toi", factors.lora_B, core, factors.lora_A)
    if not rows:
        return x @ weights[0].T
    return torch.stack([element @ weights[row].T for element, row in zip(x, rows, strict=True)])


# (shape of x, rows, task of each element of x)
CASES = {
    "one task, 1-D": ((IN,), None, []),
    "one task, 2-D": ((4, IN), None, [0, 0, 0, 0]),
    "one task, 3-D": ((2, 7, IN), None, [0, 0]),
    "one task, 4-D": ((2, 3, 7, IN), None, [0, 0]),
    "a task each, 2-D": ((TASKS, IN), None, [0, 1, 2]),
    "a task each, 4-D": ((TASKS, 2, 7, IN), None, [0, 1, 2]),
    "mixed, 2-D": ((4, IN), [2, 0, 2, 1], [2, 0, 2, 1]),
    "mixed, 3-D": ((3, 7, IN), [1, 2, 0], [1, 2, 0]),
    "mixed, 4-D": ((2, 3, 7, IN), [1, 2], [1, 2]),
    "one row": ((1, 7, IN), [2], [2]),
    "no rows": ((0, IN), [], []),
}


@pytest.mark.parametrize("core", [R, 1], ids=["matrix", "number"])
@pytest.mark.parametrize(("shape", "rows", "tasks"), CASES.values(), ids=CASES)
def test_apply_and_its_gradients_equal_the_dense_product(
    shape: tuple[int, ...], rows: list[int] | None, tasks: list[int], core: int
) -> None:
    factors = make_factors(1 if rows is None and not any(tasks) else TASKS, core=core)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    indices = None if rows is None else torch.tensor(rows, dtype=torch.long)
    expected = dense_apply(factors, x, tasks)
    assert expected.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(factors.apply(x, indices), expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)

    # Added to another output in one pass, which stays as it is.
    onto = torch.randn_like(expected, requires_grad=True)
    before = onto.detach().clone()
    actual, expected = factors.apply(x, indices, onto), onto + expected
    torch.testing.assert_close(actual, expected, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)
    assert torch.equal(onto, before)
    inputs = (x, onto, *factors)
    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, inputs, direction)
    expected_gradients = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close(gradients, expected_gradients, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


def test_outputs_of_another_dtype_are_promoted() -> None:
    factors = make_factors(dtype=torch.float32)
    x, onto = torch.randn(TASKS, 7, IN), torch.randn(TASKS, 7, OUT).to(torch.bfloat16)
    assert torch.equal(factors.apply(x, None, onto), onto + factors.apply(x, None))


def test_float32_stays_float32_and_accurate() -> None:
    factors = make_factors(dtype=torch.float32)
    x = torch.randn(4, IN)
    rows = torch.tensor([2, 0, 2, 1])
    expected = Factors(*(tensor.double() for tensor in factors)).apply(x.double(), rows)
    actual = factors.apply(x, rows)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("core", [R, 1], ids=["matrix", "number"])
def test_delta_weight_is_the_dense_product_of_every_task(core: int) -> None:
    factors = make_factors(core=core)
    identity = torch.eye(IN, dtype=torch.float64)
    assert factors.delta_weight().shape == (TASKS, OUT, IN)
    for task in range(TASKS):
        torch.testing.assert_close(
            factors.delta_weight()[task],
            dense_apply(factors, identity[None], [task])[0].T,
            rtol=FLOAT64_EXACT,
            atol=FLOAT64_EXACT,
        )
