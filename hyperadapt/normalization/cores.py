"""Cores of many pairs of factors: by kernels where they serve, elsewhere by the formulas from Gram matrices.

A method whose core is a number takes one launch in each direction (``scale``), a matrix two: the Gram matrices', and
one that works on them alone, the operator in here. ``python -m benchmarks.launches`` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperadapt.normalization.gram import grams, kernels_serve
from hyperadapt.normalization.methods import Normalization
from hyperadapt.normalization.scale import scales


def cores(
    rows_A: Sequence[Tensor], rows_B: Sequence[Tensor], method: Normalization, options: Mapping[str, Any]
) -> Tensor:
    """Cores ``(n, pairs, r, r)``, or ``(n, pairs, 1, 1)`` where they are numbers, float32 or float64.

    Of A of shapes (n, p, r, in) and as many Bᵀ (n, p, r, out), with one n, r, dtype and device; `pairs` sums p.
    A bound is a number or broadcasts to ``(n, pairs)``, logits are ``(n, pairs, r, r)``.
    """
    tensors, pairs = [*rows_A, *rows_B], sum(rows.shape[1] for rows in rows_A)
    if method.core is None:
        n, like = tensors[0].shape[0], tensors[0]
        return torch.ones(n, pairs, 1, 1, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if method.kernel == "scale" and kernels_serve(tensors[0]):
        return scales(tensors, _bounds(options.get("bound"), rows_A[0], pairs))[..., None, None]
    return cores_of_grams(grams(tensors), method, options)


def cores_of_grams(joined: Tensor, method: Normalization, options: Mapping[str, Any]) -> Tensor:
    """The same of the Gram matrices of all A and then of all B, ``(n, 2·pairs, r, r)``."""
    assert method.core is not None
    options = {**method.options, **options}
    if method.kernel not in (None, "scale") and kernels_serve(joined) and multiplies_float64():
        extra, numbers = _kernel_arguments(joined, options)
        if method.kernel != "whitening" or _whitening_serves(joined.shape[-1], numbers[0]):
            core: Tensor = _core(method.kernel, joined, extra, numbers)[0]
            return core
    return method.core(*joined.chunk(2, dim=1), **options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_float64() -> bool:
    """Whether Triton multiplies matrices in float64: releases before 3.5 fail to compile that."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)


# Of whitening; below, what rounding leaves of a zero eigenvalue counts, and eigenvalues must tell it apart.
SMALLEST_KERNEL_RIDGE = 1e-6


def _whitening_serves(r: int, ridge: float) -> bool:
    """Whether the kernel serves: on AMD, its gradient does not fit into registers at r = 64."""
    return ridge >= SMALLEST_KERNEL_RIDGE and (r <= 32 or torch.version.hip is None)


def _kernel_arguments(joined: Tensor, options: Mapping[str, Any]) -> tuple[Tensor | None, list[float]]:
    """The tensor among a method's options, as kernels take it, and the numbers among them, in order."""
    if "bound" in options:
        return _bounds(options["bound"], joined, joined.shape[1] // 2), []
    extra = options.get("logits")
    if extra is not None:
        extra = extra.to(joined.dtype).expand(joined.shape[0], joined.shape[1] // 2, *joined.shape[2:])
    numbers = [
        value == "both" if isinstance(value, str) else value for name, value in options.items() if name != "logits"
    ]
    return extra, [float(number) for number in numbers]


def _bounds(bound: float | Tensor | None, like: Tensor, pairs: int) -> Tensor | None:
    if bound is None:
        return None
    # A number is filled in on the device; copying it there would make the host wait.
    values = bound.float() if isinstance(bound, Tensor) else like.new_full((), bound, dtype=torch.float32)
    return values.expand(like.shape[0], pairs)


@torch.library.custom_op(
    "hyperadapt::core",
    mutates_args=(),
    schema="(str kernel, Tensor grams, Tensor? extra, float[] numbers) -> Tensor[]",
)
def _core(kernel: str, joined: Tensor, extra: Tensor | None, numbers: list[float]) -> list[Tensor]:
    from hyperadapt.normalization import core_triton

    outputs = _empty(kernel, joined, numbers)
    core_triton.forward(kernel, joined.contiguous(), extra, numbers, outputs)
    return outputs


@torch.library.custom_op(
    "hyperadapt::core_backward",
    mutates_args=(),
    schema="(str kernel, Tensor grams, Tensor? extra, float[] numbers, Tensor[] outputs, Tensor grad) -> Tensor[]",
)
def _core_backward(
    kernel: str, joined: Tensor, extra: Tensor | None, numbers: list[float], outputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    from hyperadapt.normalization import core_triton

    gradients = _empty_gradients(joined, extra)
    core_triton.backward(kernel, joined.contiguous(), extra, numbers, outputs, grad.contiguous(), gradients)
    return gradients


@_core.register_fake
def _(kernel: str, joined: Tensor, extra: Tensor | None, numbers: list[float]) -> list[Tensor]:
    return _empty(kernel, joined, numbers)


@_core_backward.register_fake
def _(
    kernel: str, joined: Tensor, extra: Tensor | None, numbers: list[float], outputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    return _empty_gradients(joined, extra)


def _setup_context(ctx: Any, inputs: tuple[str, Tensor, Tensor | None, list[float]], output: list[Tensor]) -> None:
    ctx.kernel, joined, extra, ctx.numbers = inputs
    ctx.save_for_backward(joined, extra, *output)
    # Zeros for what is saved would be more launches.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[None, Tensor, Tensor | None, list[None] | None]:
    joined, extra, *outputs = ctx.saved_tensors
    # Torch takes an empty list for a structure, others for a value.
    grad_grams, *grad_extra = _core_backward(ctx.kernel, joined, extra, ctx.numbers, outputs, grads[0])
    return None, grad_grams, grad_extra[0] if grad_extra else None, None if ctx.numbers else []


_core.register_autograd(_backward, setup_context=_setup_context)


def _empty(kernel: str, joined: Tensor, numbers: list[float]) -> list[Tensor]:
    """Place for the core, and for what the gradient needs beside the Gram matrices."""
    n, both, r, _ = joined.shape
    pairs = both // 2

    def place(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return joined.new_empty((n, *shape), dtype=dtype)

    if kernel == "soft_polar":
        # The core with more digits, and the shift of its eigenvalues.
        saved = [place(pairs, r, r, dtype=torch.float64), place(pairs, dtype=torch.float64)]
    elif kernel == "whitening":
        # Both inverse roots, and the shifts.
        saved = [place(both, r, r, dtype=torch.float64), place(both, dtype=torch.float64)]
    elif kernel == "spectral":
        # Singular vectors, of A and of B.
        return [place(pairs, 1, 1), place(both, r, dtype=torch.float64)]
    elif kernel == "sinkhorn":
        # Logarithms of the mixing and of all sums that were divided by.
        saved = [place(pairs, r, r), place(pairs, 2 * int(numbers[0]), r)]
    else:
        saved = []
    return [place(pairs, r, r), *saved]


def _empty_gradients(joined: Tensor, extra: Tensor | None) -> list[Tensor]:
    """Place for the gradients of the Gram matrices and of the other tensor."""
    contiguous = torch.contiguous_format
    extras = [] if extra is None else [torch.empty_like(extra, memory_format=contiguous)]
    return [torch.empty_like(joined, memory_format=contiguous), *extras]
