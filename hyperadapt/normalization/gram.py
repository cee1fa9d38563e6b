"""Gram matrices of many factors of different widths, as one operator: one kernel launch on a GPU with Triton.

``HYPERADAPT_KERNELS=reference`` in the environment makes the operator use plain torch everywhere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Of r; beyond, one program can no longer hold the Gram matrix.
LARGEST_KERNEL_RANK = 64
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grams(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gram matrices X·Xᵀ of batches of shape (n, r, d) with one r, dtype and device, each of shape ``(n, r, r)``.

    Float32, or float64 for float64. Each input element is read once. The gradient with respect to X is (H + Hᵀ)·X, with
    H that of its Gram matrix.
    """
    joined = _grams(list(tensors))
    return list(torch.split(joined, [tensor.shape[0] for tensor in tensors]))


def grams_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The operator in plain torch: all Gram matrices, shape ``(sum of n, r, r)``, float32 or float64."""
    return torch.cat([_wide(tensor) @ _wide(tensor).mT for tensor in tensors])


def grams_backward_reference(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The operator's gradient in plain torch, like `tensors`; `grad` has the shape ``(sum of n, r, r)``."""
    symmetric = torch.split(grad + grad.mT, [tensor.shape[0] for tensor in tensors])
    return [(part @ _wide(tensor)).to(tensor.dtype) for part, tensor in zip(symmetric, tensors, strict=True)]


@torch.library.custom_op("hyperadapt::grams", mutates_args=(), schema="(Tensor[] tensors) -> Tensor")
def _grams(tensors: list[Tensor]) -> Tensor:
    if not _kernel_serves(tensors):
        return grams_reference(tensors)
    from hyperadapt.normalization import gram_triton

    table = _table(tuple((len(tensor), tensor.shape[2]) for tensor in tensors), tensors[0].device)
    output = _empty_grams(tensors)
    gram_triton.forward([tensor.contiguous() for tensor in tensors], table, output)
    return output


@torch.library.custom_op(
    "hyperadapt::grams_backward", mutates_args=(), schema="(Tensor[] tensors, Tensor grad) -> Tensor[]"
)
def _grams_backward(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    if not _kernel_serves(tensors):
        return grams_backward_reference(tensors, grad)
    from hyperadapt.normalization import gram_triton

    table = _table(tuple((len(tensor), tensor.shape[2]) for tensor in tensors), tensors[0].device)
    gradients = _empty_gradients(tensors)
    gram_triton.backward([tensor.contiguous() for tensor in tensors], table, grad.contiguous(), gradients)
    return gradients


@_grams.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return _empty_grams(tensors)


@_grams_backward.register_fake
def _(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return _empty_gradients(tensors)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
    gradients: list[Tensor] = _grams_backward(list(ctx.saved_tensors), grad)
    return gradients


_grams.register_autograd(_backward, setup_context=_setup_context)


def _kernel_serves(tensors: Sequence[Tensor]) -> bool:
    return (
        tensors[0].is_cuda
        and tensors[0].dtype in KERNEL_DTYPES
        and tensors[0].shape[1] <= LARGEST_KERNEL_RANK
        and os.environ.get("HYPERADAPT_KERNELS") != "reference"
        and importlib.util.find_spec("triton") is not None
        # The kernel reads addresses that are copied from the host, which a replayed graph would read anew.
        and not torch.cuda.is_current_stream_capturing()
    )


@lru_cache(maxsize=64)
def _table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows = [(tensor, index, width) for tensor, (count, width) in enumerate(shapes) for index in range(count)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _empty_grams(tensors: Sequence[Tensor]) -> Tensor:
    r = tensors[0].shape[1]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tensors[0].new_empty((sum(tensor.shape[0] for tensor in tensors), r, r), dtype=dtype)


def _empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
