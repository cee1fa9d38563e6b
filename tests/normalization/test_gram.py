"""The Gram operator: its reference, and its kernels under Triton's interpreter or, where there is one, on a GPU."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperadapt.normalization import gram
from hyperadapt.normalization.gram import grams, grams_backward_reference, grams_reference
from tests.support.kernels import INTERPRETED, NEEDS_KERNELS, PLACE, run_interpreted
from tests.support.tolerances import FLOAT64_EXACT, gram_error, tensor_core_gram_error

# (matrices, d) of each batch: widths below, at, above and no multiple of a tile and of 16.
ALIGNED = [(3, 48), (1, 128), (2, 272)]
RAGGED = [(3, 48), (2, 21), (1, 1), (2, 133)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TASKS = 2


def draw(shapes: list[tuple[int, int]], r: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(TASKS, count, r, width).to(device, dtype) for count, width in shapes]


def parts(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The Gram matrices of each tensor."""
    return torch.split(grams(tensors), [tensor.shape[1] for tensor in tensors], dim=1)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 4, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_kernels_equal_the_reference(shapes: list[tuple[int, int]], r: int, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    from hyperadapt.normalization import gram_triton

    tensors = draw(shapes, r, dtype, PLACE)
    table = gram.shape_table(tensors)
    # NaN shows every element that is never written.
    output = torch.full((TASKS, len(table), r, r), torch.nan, device=PLACE)
    gram_triton.gram_forward(tensors, table, output)
    expected = grams_reference([tensor.double() for tensor in tensors])
    for position, width in enumerate(table[:, 3].tolist()):
        actual, exact = output[:, position].double(), expected[:, position]
        torch.testing.assert_close(actual, exact, rtol=0, atol=tensor_core_gram_error(width, dtype))

    grad = torch.randn(TASKS, len(table), r, r, device=PLACE)
    gradients = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    gram_triton.gram_backward(tensors, table, grad, gradients)
    exact_gradients = grams_backward_reference([tensor.double() for tensor in tensors], grad.double())
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        # The result is rounded to the factors' dtype, the sum over r before it as a Gram entry's.
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=rounding + gram_error(4 * r))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__, "kernels_equal", "28 passed, 14 skipped")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_operator_equals_plain_products(dtype: torch.dtype) -> None:
    tensors = draw(RAGGED, 4, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for actual, tensor in zip(parts(tensors), tensors, strict=True):
        assert actual.dtype == wide
        assert torch.equal(actual, tensor.to(wide) @ tensor.to(wide).mT)


def test_gradients_are_those_of_plain_products() -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(RAGGED, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *inputs: grams(inputs), tensors)
    # One output unused, and gradients that are not contiguous.
    first, *_, last = parts(tensors)
    grads = torch.autograd.grad((first.mT.sum() + (last[:, 0] * 2).sum()), tensors, allow_unused=True)
    plain = [tensor @ tensor.mT for tensor in tensors]
    expected = torch.autograd.grad(plain[0].sum() + (plain[-1][:, 0] * 2).sum(), tensors, materialize_grads=True)
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=FLOAT64_EXACT, atol=FLOAT64_EXACT)


def test_inputs_need_not_be_contiguous() -> None:
    tensor = torch.randn(2, 3, 21, 4).mT.requires_grad_()
    actual = grams([tensor])
    assert torch.equal(actual, tensor.contiguous() @ tensor.contiguous().mT)


def test_the_operator_is_registered_soundly_and_compiles_whole() -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(RAGGED, 4, torch.float32)]
    torch.library.opcheck(gram._grams, (tensors,))
    torch.library.opcheck(gram._grams_backward, ([t.detach() for t in tensors], torch.randn(TASKS, 8, 4, 4)))

    def loss(inputs: list[Tensor]) -> Tensor:
        return torch.stack([part.square().sum() for part in parts(inputs)]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(tensors), tensors)
    expected = torch.autograd.grad(loss(tensors), tensors)
    for gradient, exact in zip(actual, expected, strict=True):
        assert torch.equal(gradient, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_operator_uses_the_kernel_and_repeats_its_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw([(64, 4096), (32, 11008)], 16, dtype, "cuda")
    first = grams(tensors)
    for _ in range(5):
        assert torch.equal(grams(tensors), first)
    firsts = parts(tensors)
    monkeypatch.setenv("HYPERADAPT_KERNELS", "reference")
    for reference, once, tensor in zip(parts(tensors), firsts, tensors, strict=True):
        limit = gram_error(tensor.shape[3]) + tensor_core_gram_error(tensor.shape[3], dtype)
        torch.testing.assert_close(once, reference, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"r": 65}, False),
        ({"dtype": torch.float64}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_which_inputs_the_kernel_serves(change: dict[str, Any], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inputs:
        is_cuda = change.get("device", "cuda") == "cuda"
        dtype = change.get("dtype", torch.float32)
        shape = (1, 2, change.get("r", 16), 64)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert gram.kernels_serve(Inputs()) == served
    monkeypatch.setenv("HYPERADAPT_KERNELS", "reference")
    assert not gram.kernels_serve(Inputs())
    monkeypatch.delenv("HYPERADAPT_KERNELS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not gram.kernels_serve(Inputs())
