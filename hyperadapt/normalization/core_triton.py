"""Triton kernels for the other cores, from Gram matrices, and the launch of all; imported only where they run.

One program per pair. `grams` holds, of each task, first the Gram matrices of all A and then those of all B.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperadapt.normalization import root_triton
from hyperadapt.normalization.matrix_triton import (
    inner_product,
    inverse_of,
    load_matrix,
    multiply,
    not_negative,
    store_matrix,
)

# Warps by padded r: of those that need no more registers than there are, the fewest.
WARPS = {16: 2, 32: 4, 64: 8}


@triton.jit  # type: ignore[untyped-decorator]
def _spectral_forward_kernel(grams, cores, vectors, pairs, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """1/σ, and vectors p and q = G_B·p/σ with G_A·G_B·p = σ²·p and pᵀ·G_B·p = 1, for the largest singular value σ.

    Squaring G_A·G_B 27 times leaves the projection on the space of p, of which a longest column is taken, where the
    next eigenvalue is smaller by 1e-6 of σ². σ is a Rayleigh quotient, whose error is the square of p's.
    """
    program = tl.program_id(0).to(tl.int64)
    task, position = program // pairs, program % pairs
    place_A = task * 2 * pairs + position
    gram_A, gram_B = grams + place_A * R * R, grams + (place_A + pairs) * R * R
    power = multiply(load_matrix(gram_A, R, P), load_matrix(gram_B, R, P))
    for _ in range(27):
        size = tl.sqrt(inner_product(power, power))
        power = power * inverse_of(size)
        power = multiply(power, power)
    i = tl.arange(0, P)
    best = tl.argmax(tl.sum(power * power, axis=0), axis=0)
    column = tl.sum(tl.where(i[None, :] == best, power, 0.0), axis=1)
    # The next two are symmetric, so that columns may be summed for rows.
    image = tl.sum(load_matrix(gram_B, R, P) * column[:, None], axis=0)
    length = tl.sqrt(not_negative(inner_product(load_matrix(gram_B, R, P), column[:, None] * column[None, :])))
    square = tl.sum(tl.sum(load_matrix(gram_A, R, P) * image[:, None] * image[None, :], axis=1), axis=0)
    # In units of p's length.
    inverse_length = inverse_of(length)
    sigma = tl.sqrt(not_negative(square)) * inverse_length
    # Of zero and subnormal numbers, zero; what is not finite stays so.
    inverse = tl.where(sigma < 1.1754943508222875e-38, 0.0, inverse_of(sigma))
    tl.store(cores + program, inverse.to(tl.float32))
    tl.store(vectors + place_A * R + i, image * (inverse_length * inverse), mask=i < R)
    tl.store(vectors + (place_A + pairs) * R + i, column * inverse_length, mask=i < R)


@triton.jit  # type: ignore[untyped-decorator]
def _spectral_backward_kernel(cores, vectors, grad_cores, grad_grams, pairs, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """H = -g/(2σ) times q·qᵀ for A, and p·pᵀ for B: ∂σ/∂G_A = σ·q·qᵀ/2, ∂σ/∂G_B = σ·p·pᵀ/2."""
    program = tl.program_id(0).to(tl.int64)
    task, position = program // pairs, program % pairs
    scale = -tl.load(grad_cores + program).to(tl.float64) * tl.load(cores + program).to(tl.float64) / 2
    i = tl.arange(0, P)
    for side in tl.static_range(2):
        place = (task * 2 + side) * pairs + position
        row = tl.load(vectors + place * R + i[None, :], mask=(i < R)[None, :], other=0.0)
        column = tl.load(vectors + place * R + i[:, None], mask=(i < R)[:, None], other=0.0)
        store_matrix(grad_grams + place * R * R, scale * column * row, R, P)


@triton.jit  # type: ignore[untyped-decorator]
def _inverse_lengths(gram, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """1/√ of a Gram matrix's diagonal, float32, 0 for zero and subnormal numbers."""
    i = tl.arange(0, P)
    square = tl.load(gram + i * R + i, mask=i < R, other=0.0)
    normal = (square < 1.1754943508222875e-38) == 0
    return tl.where(normal, 1 / tl.sqrt(tl.where(normal, square, 1.0)), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _log_sums(x, axis: tl.constexpr, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log Σ exp of the columns (axis 0) or rows of a padded matrix, whose padding gives 0."""
    i = tl.arange(0, P)
    x = tl.where((i < R)[:, None] & (i < R)[None, :], x, -float("inf"))
    top = tl.where(i < R, tl.max(x, axis=axis), 0.0)
    total = tl.sum(tl.exp(x - tl.expand_dims(top, axis)), axis=axis)
    return top + tl.log(tl.where(i < R, total, 1.0))


@triton.jit  # type: ignore[untyped-decorator]
def _mixing_forward_kernel(  # type: ignore[no-untyped-def]
    grams, logits, iterations, temperature, cores, mixings, sums, pairs,
    R: tl.constexpr, P: tl.constexpr, MIXES: tl.constexpr,
):  # fmt: skip
    """diag(1/|b|)·M·diag(1/|a|) with Sinkhorn's M of the logits, or with M = I; sums are kept for the way back."""
    program = tl.program_id(0).to(tl.int64)
    gram_A = grams + ((program // pairs) * 2 * pairs + program % pairs) * R * R
    a, b = _inverse_lengths(gram_A, R, P), _inverse_lengths(gram_A + pairs * R * R, R, P)
    i = tl.arange(0, P)
    if MIXES:
        inside = (i < R)[:, None] & (i < R)[None, :]
        x = tl.load(logits + program * R * R + i[:, None] * R + i[None, :], mask=inside, other=0.0) / temperature
        for step in range(iterations):
            place = sums + (program * 2 * iterations + 2 * step) * R + i
            columns = _log_sums(x, 0, R, P)
            x = x - columns[None, :]
            rows = _log_sums(x, 1, R, P)
            x = x - rows[:, None]
            tl.store(place, columns, mask=i < R)
            tl.store(place + R, rows, mask=i < R)
        store_matrix(mixings + program * R * R, x, R, P)
        mixing = tl.exp(x)
    else:
        mixing = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    store_matrix(cores + program * R * R, b[:, None] * mixing * a[None, :], R, P)


@triton.jit  # type: ignore[untyped-decorator]
def _mixing_backward_kernel(  # type: ignore[no-untyped-def]
    grams, iterations, temperature, mixings, sums, grad_cores, grad_grams, grad_logits, pairs,
    R: tl.constexpr, P: tl.constexpr, MIXES: tl.constexpr,
):  # fmt: skip
    """The way back: a row pass of result M takes the gradient D of log M to D - M·(sums of D over rows).

    With t = g∘M/(|b|·|a|), the diagonals of G_A and G_B get -Σ t/(2|a|²) over columns and -Σ t/(2|b|²) over rows.
    """
    program = tl.program_id(0).to(tl.int64)
    place_A = ((program // pairs) * 2 * pairs + program % pairs) * R * R
    place_B = place_A + pairs * R * R
    a, b = _inverse_lengths(grams + place_A, R, P), _inverse_lengths(grams + place_B, R, P)
    i = tl.arange(0, P)
    inside = (i < R)[:, None] & (i < R)[None, :]
    diagonal = i[:, None] == i[None, :]
    square = program * R * R + i[:, None] * R + i[None, :]
    grad = tl.load(grad_cores + square, mask=inside, other=0.0) * b[:, None] * a[None, :]
    if MIXES:
        x = tl.load(mixings + square, mask=inside, other=-float("inf"))
        grad = grad * tl.exp(x)
    else:
        grad = tl.where(diagonal, grad, 0.0)
    to_A, to_B = tl.sum(grad, axis=0) * a * a / -2, tl.sum(grad, axis=1) * b * b / -2
    store_matrix(grad_grams + place_A, tl.where(diagonal, to_A[None, :], 0.0), R, P)
    store_matrix(grad_grams + place_B, tl.where(diagonal, to_B[:, None], 0.0), R, P)
    if MIXES:
        for step in range(iterations):
            place = sums + (program * 2 * iterations + 2 * (iterations - 1 - step)) * R + i
            grad = grad - tl.exp(x) * tl.sum(grad, axis=1)[:, None]
            x = x + tl.load(place + R, mask=i < R, other=0.0)[:, None]
            grad = grad - tl.exp(x) * tl.sum(grad, axis=0)[None, :]
            x = x + tl.load(place, mask=i < R, other=0.0)[None, :]
        tl.store(grad_logits + square, grad / temperature, mask=inside)


def forward(kernel: str, grams: Tensor, extra: Tensor | None, numbers: list[float], outputs: list[Tensor]) -> None:
    """Fill `outputs`, the core and what its gradient needs, from contiguous float32 (n, 2·pairs, r, r)."""
    core, *saved = outputs
    grid, fixed = _launch(grams)
    pairs = grams.shape[1] // 2
    if kernel == "soft_polar":
        assert extra is not None
        root_triton.soft_polar_forward_kernel[grid](grams, extra, *extra.stride(), core, *saved, pairs, **fixed)
    elif kernel == "spectral":
        _spectral_forward_kernel[grid](grams, core, *saved, pairs, **fixed)
    elif kernel == "whitening":
        ridge, both = numbers
        root_triton.whitening_forward_kernel[grid](grams, ridge, core, *saved, pairs, BOTH=bool(both), **fixed)
    else:
        logits, iterations, temperature, (mixings, sums) = _mixing_arguments(core, extra, numbers, saved)
        _mixing_forward_kernel[grid](
            grams, logits, iterations, temperature, core, mixings, sums, pairs, MIXES=extra is not None, **fixed
        )


def backward(
    kernel: str,
    grams: Tensor,
    extra: Tensor | None,
    numbers: list[float],
    outputs: list[Tensor],
    grad: Tensor,
    gradients: list[Tensor],
) -> None:
    """Fill `gradients`, of the Gram matrices and of the extra tensor, from the core's, all contiguous."""
    core, *saved = outputs
    grid, fixed = _launch(grams)
    pairs = grams.shape[1] // 2
    if kernel == "soft_polar":
        assert extra is not None
        root_triton.soft_polar_backward_kernel[grid](
            grams, extra, *extra.stride(), *saved, grad, *gradients, _scratch(grams), pairs, **fixed
        )
    elif kernel == "spectral":
        _spectral_backward_kernel[grid](core, *saved, grad, *gradients, pairs, **fixed)
    elif kernel == "whitening":
        root_triton.whitening_backward_kernel[grid](
            grams, *saved, grad, *gradients, _scratch(grams), pairs, BOTH=bool(numbers[1]), **fixed
        )
    else:
        _, iterations, temperature, (mixings, sums) = _mixing_arguments(core, extra, numbers, saved)
        _mixing_backward_kernel[grid](
            grams, iterations, temperature, mixings, sums, grad, gradients[0], gradients[-1], pairs,
            MIXES=extra is not None, **fixed,
        )  # fmt: skip


def _mixing_arguments(
    core: Tensor, extra: Tensor | None, numbers: list[float], saved: list[Tensor]
) -> tuple[Tensor, int, float, list[Tensor]]:
    if extra is None:
        # Nothing is read there.
        return core, 0, 1.0, [core, core]
    return extra.contiguous(), int(numbers[0]), numbers[1], saved


def _scratch(grams: Tensor) -> Tensor:
    """Place for two matrices of each program."""
    (programs,), fixed = _launch(grams)
    return grams.new_empty((programs, 2, fixed["P"], fixed["P"]), dtype=torch.float64)


def _launch(grams: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    n, both, r, _ = grams.shape
    return (n * both // 2,), constants_of(r, torch.version.hip is not None)


def constants_of(r: int, is_amd: bool) -> dict[str, Any]:
    """What the kernels are compiled for at a rank."""
    padded = max(16, triton.next_power_of_2(r))
    fixed = {"R": r, "P": padded}
    if is_amd:
        # A warp has twice the threads.
        return {**fixed, "num_warps": WARPS[padded] // 2}
    # Unless ptxas is told that it may use all registers, it saves some for more programs at once, and spills a few
    # bytes. Where it needs all, it spills when told so.
    return {**fixed, "num_warps": WARPS[padded]} | ({"maxnreg": 255} if padded < 64 else {})
