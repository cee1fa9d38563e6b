"""Gram matrices of many factors of different widths, as one operator: one kernel launch on a GPU with Triton.

``HYPERADAPT_KERNELS=reference`` in the environment makes it plain torch everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of r; beyond, one program can no longer hold the Gram matrix.
LARGEST_KERNEL_RANK = 64
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grams(tensors: Sequence[Tensor]) -> Tensor:
    """Gram matrices X·Xᵀ of batches of shape (n, p, r, d) with one n, r, dtype and device, ``(n, sum of p, r, r)``.

    Float32, or float64 for float64. Each input element is read once. The gradient with respect to X is (H + Hᵀ)·X, with
    H that of its Gram matrix.
    """
    joined: Tensor = _grams(list(tensors))
    return joined


def grams_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The operator in plain torch."""
    return torch.cat([_wide(tensor) @ _wide(tensor).mT for tensor in tensors], dim=1)


def grams_backward_reference(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The operator's gradient in plain torch, like `tensors`; `grad` has the shape of the Gram matrices."""
    symmetric = torch.split(grad + grad.mT, [tensor.shape[1] for tensor in tensors], dim=1)
    return [(part @ _wide(tensor)).to(tensor.dtype) for part, tensor in zip(symmetric, tensors, strict=True)]


@torch.library.custom_op("hyperadapt::grams", mutates_args=(), schema="(Tensor[] tensors) -> Tensor")
def _grams(tensors: list[Tensor]) -> Tensor:
    if not kernels_serve(tensors[0]):
        return grams_reference(tensors)
    from hyperadapt.normalization import gram_triton

    tensors, output = contiguous(tensors), empty_grams(tensors)
    gram_triton.gram_forward(tensors, shape_table(tensors), output)
    return output


@torch.library.custom_op(
    "hyperadapt::grams_backward", mutates_args=(), schema="(Tensor[] tensors, Tensor grad) -> Tensor[]"
)
def _grams_backward(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    if not kernels_serve(tensors[0]):
        return grams_backward_reference(tensors, grad)
    from hyperadapt.normalization import gram_triton

    tensors, gradients = contiguous(tensors), empty_gradients(tensors)
    gram_triton.gram_backward(tensors, shape_table(tensors), grad.contiguous(), gradients)
    return gradients


@_grams.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return empty_grams(tensors)


@_grams_backward.register_fake
def _(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return empty_gradients(tensors)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
    gradients: list[Tensor] = _grams_backward(list(ctx.saved_tensors), grad)
    return gradients


_grams.register_autograd(_backward, setup_context=_setup_context)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_are_on() -> bool:
    """Whether Triton is installed and the environment does not ask for plain torch."""
    return os.environ.get("HYPERADAPT_KERNELS") != "reference" and importlib.util.find_spec("triton") is not None


def kernels_serve(tensor: Tensor) -> bool:
    """Whether kernels serve factors of this device, dtype and rank, the last dimension but one."""
    return (
        tensor.is_cuda
        and tensor.dtype in KERNEL_DTYPES
        and tensor.shape[-2] <= LARGEST_KERNEL_RANK
        and kernels_are_on()
    )


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, each copied only if it is not contiguous yet."""
    return [tensor.contiguous() for tensor in tensors]


def shape_table(tensors: Sequence[Tensor]) -> Tensor:
    """By place among all p: the tensor, the index in it, its p, its width; int32 ``(sum of p, 4)`` on the device."""
    return _shape_table(tuple((tensor.shape[1], tensor.shape[3]) for tensor in tensors), tensors[0].device)


# Never forgotten: a CUDA graph that reads one may be replayed at any time. There is one for each set of positions.
@functools.cache
def _shape_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows = [(tensor, index, count, width) for tensor, (count, width) in enumerate(shapes) for index in range(count)]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def empty_grams(tensors: Sequence[Tensor]) -> Tensor:
    """Place for the Gram matrices."""
    n, _, r, _ = tensors[0].shape
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tensors[0].new_empty((n, sum(tensor.shape[1] for tensor in tensors), r, r), dtype=dtype)


def empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Place for gradients of the tensors."""
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
