"""The scale of a pair of factors by its Frobenius norm, as one operator: a kernel that reads each factor once.

For GPUs with Triton alone; elsewhere the formulas do the same from Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadapt.normalization.gram import contiguous, empty_gradients, empty_grams, shape_table


def scales(tensors: Sequence[Tensor], bounds: Tensor | None) -> Tensor:
    """Scale (1 + f²/c²)^(-1/2) of each pair, with f = ‖B·A‖ and its bound c, or 1/f without bounds, ``(n, pairs)``.

    The tensors are those of ``grams``: first all A, then as many Bᵀ of the same counts. Bounds are ``(n, pairs)``,
    float32. In float32; in each direction one launch.
    """
    result: Tensor = _scales(list(tensors), bounds)[0]
    return result


@torch.library.custom_op(
    "hyperadapt::scales", mutates_args=(), schema="(Tensor[] tensors, Tensor? bounds) -> (Tensor, Tensor)"
)
def _scales(tensors: list[Tensor], bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    from hyperadapt.normalization import gram_triton

    tensors, (result, grams) = contiguous(tensors), _empty(tensors)
    gram_triton.scale_forward(tensors, shape_table(tensors), bounds, result, grams)
    return result, grams


@torch.library.custom_op(
    "hyperadapt::scales_backward",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor? bounds, Tensor scales, Tensor grams, Tensor grad) -> Tensor[]",
)
def _scales_backward(
    tensors: list[Tensor], bounds: Tensor | None, scales: Tensor, grams: Tensor, grad: Tensor
) -> list[Tensor]:
    from hyperadapt.normalization import gram_triton

    tensors, gradients, grad_bounds = contiguous(tensors), empty_gradients(tensors), torch.empty_like(scales)
    gram_triton.scale_backward(
        tensors, shape_table(tensors), bounds, scales, grams, grad.contiguous(), grad_bounds, gradients
    )
    return [*gradients, grad_bounds]


@_scales.register_fake
def _(tensors: list[Tensor], bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(tensors)


@_scales_backward.register_fake
def _(tensors: list[Tensor], bounds: Tensor | None, scales: Tensor, grams: Tensor, grad: Tensor) -> list[Tensor]:
    return [*empty_gradients(tensors), torch.empty_like(scales)]


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    tensors, bounds = inputs
    ctx.save_for_backward(bounds, *output, *tensors)
    ctx.mark_non_differentiable(output[1])
    # Zeros for it would be another launch.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[list[Tensor], Tensor | None]:
    bounds, result, grams, *tensors = ctx.saved_tensors
    *gradients, grad_bounds = _scales_backward(tensors, bounds, result, grams, grad)
    return gradients, None if bounds is None else grad_bounds


_scales.register_autograd(_backward, setup_context=_setup_context)


def _empty(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Place for the scales and for the Gram matrices, which the gradient needs."""
    grams = empty_grams(tensors)
    return grams.new_empty((grams.shape[0], grams.shape[1] // 2)), grams
