"""Triton kernels that read factors, for Gram matrices and for scales by a norm; imported only where they run.

One program per matrix, or per pair, so there is nothing to combine between programs: one launch, and the same bits on
every run. Each reads its ``r`` rows once, in tiles, and accumulates in float32. The factors are kernel arguments, and
the table of their shapes is on the device, so a launch copies nothing there, and a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# By padded r: columns per tile, warps, and how float32 is multiplied. The largest that compile without spilling
# registers on sm_80, sm_90 and sm_100; at r = 64 exact float32 products do not, and the three-pass TF32 does.
CONFIGURATIONS = {16: (128, 4, "ieee"), 32: (64, 4, "ieee"), 64: (32, 4, "tf32x3")}


@triton.jit  # type: ignore[untyped-decorator]
def _matrix(tensors, table, program, positions, R: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the matrix of a program begins, and its width; the table has (tensor, index, count, width) by position."""
    row = table + 4 * (program % positions)
    tensor = tl.load(row)
    index = (program // positions) * tl.load(row + 2) + tl.load(row + 1)
    width = tl.load(row + 3)
    start = tensors[0]
    for other in tl.static_range(1, len(tensors)):
        start = tl.where(tensor == other, tensors[other], start)
    if ALIGNED:
        # Without these hints the compiler must assume any address, and loads single elements.
        width = tl.multiple_of(width, 16)
        start = tl.multiple_of(start, 16)
    return start + index.to(tl.int64) * R * width, width


@triton.jit  # type: ignore[untyped-decorator]
def _gram(  # type: ignore[no-untyped-def]
    tensors,
    table,
    program,
    positions,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X·Xᵀ of one matrix, padded with zeros."""
    start, width = _matrix(tensors, table, program, positions, R, ALIGNED)
    rows = tl.arange(0, R_PADDED)
    columns = tl.arange(0, TILE)
    total = tl.zeros((R_PADDED, R_PADDED), dtype=tl.float32)
    for first in range(0, width, TILE):
        inside = (rows < R)[:, None] & (first + columns < width)[None, :]
        tile = tl.load(start + rows[:, None] * width + first + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(tile, tl.trans(tile), total, input_precision=PRECISION)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _store_square(target, square, R: tl.constexpr, R_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the r×r part of a padded matrix."""
    rows = tl.arange(0, R_PADDED)
    inside = (rows < R)[:, None] & (rows < R)[None, :]
    tl.store(target + rows[:, None] * R + rows[None, :], square, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gram_forward_kernel(  # type: ignore[no-untyped-def]
    tensors,
    table,
    grams,
    positions,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gram matrix of the program's matrix."""
    program = tl.program_id(0)
    total = _gram(tensors, table, program, positions, R, R_PADDED, TILE, ALIGNED, PRECISION)
    _store_square(grams + program.to(tl.int64) * R * R, total, R, R_PADDED)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_forward_kernel(  # type: ignore[no-untyped-def]
    tensors,
    table,
    bounds,
    stride_task,
    stride_position,
    scales,
    grams,
    positions,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Scale of the program's pair, (1 + f²/c²)^(-1/2) or 1/f with f² = ⟨A·Aᵀ, Bᵀ·B⟩, and both Gram matrices."""
    program = tl.program_id(0)
    task, position = program // positions, program % positions
    # In the table, and in `grams`, all A of a task stand before all B.
    first = task * 2 * positions + position
    second = first + positions
    gram_A = _gram(tensors, table, first, 2 * positions, R, R_PADDED, TILE, ALIGNED, PRECISION)
    _store_square(grams + first.to(tl.int64) * R * R, gram_A, R, R_PADDED)
    gram_B = _gram(tensors, table, second, 2 * positions, R, R_PADDED, TILE, ALIGNED, PRECISION)
    _store_square(grams + second.to(tl.int64) * R * R, gram_B, R, R_PADDED)
    f_squared = tl.sum(tl.sum(gram_A * gram_B, axis=1), axis=0).to(tl.float64)
    # NaN stays; a maximum would leave it out.
    f_squared = tl.where(f_squared < 0, 0.0, f_squared)
    if SOFT:
        c = tl.load(bounds + task * stride_task + position * stride_position).to(tl.float64)
        scale = 1 / tl.sqrt(1 + f_squared / (c * c))
    else:
        # Of zero and subnormal numbers, zero.
        normal = f_squared >= 1.1754943508222875e-38
        scale = tl.where(normal, 1 / tl.sqrt(tl.where(normal, f_squared, 1.0)), 0.0)
    tl.store(scales + program, scale.to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _tile_gradient(  # type: ignore[no-untyped-def]
    tensors, gradients, table, program, positions, first, symmetric,
    R: tl.constexpr, R_PADDED: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one tile of M·X for a symmetric M."""
    start, width = _matrix(tensors, table, program, positions, R, ALIGNED)
    target, _ = _matrix(gradients, table, program, positions, R, ALIGNED)
    rows = tl.arange(0, R_PADDED)
    columns = first + tl.arange(0, TILE)
    inside = (rows < R)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    tile = tl.load(start + offsets, mask=inside, other=0.0)
    result = tl.dot(symmetric, tile.to(tl.float32), input_precision=PRECISION)
    tl.store(target + offsets, result.to(target.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gram_backward_kernel(  # type: ignore[no-untyped-def]
    tensors,
    gradients,
    table,
    grad_grams,
    positions,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of (H + Hᵀ)·X, with H the gradient of X's Gram matrix."""
    program = tl.program_id(0)
    first = tl.program_id(1) * TILE
    if first >= tl.load(table + 4 * (program % positions) + 3):
        return
    rows = tl.arange(0, R_PADDED)
    square = (rows < R)[:, None] & (rows < R)[None, :]
    gradient = grad_grams + program.to(tl.int64) * R * R
    direct = tl.load(gradient + rows[:, None] * R + rows[None, :], mask=square, other=0.0)
    transposed = tl.load(gradient + rows[None, :] * R + rows[:, None], mask=square, other=0.0)
    _tile_gradient(
        tensors, gradients, table, program, positions, first, direct + transposed,
        R, R_PADDED, TILE, ALIGNED, PRECISION,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _scale_backward_kernel(  # type: ignore[no-untyped-def]
    tensors,
    gradients,
    table,
    bounds,
    stride_task,
    stride_position,
    scales,
    grams,
    grad_scales,
    grad_bounds,
    positions,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFT: tl.constexpr,
):
    """One tile of 2h·G_B·A or 2h·G_A·Bᵀ, h = -g·S³/(2c²) for a scale S of gradient g, c = 1 for S = 1/f.

    Of the bound, by the programs of A's first tile: g·S³·f²/c³, which is g·S·(1 - S²)/c.
    """
    program = tl.program_id(0)
    first = tl.program_id(1) * TILE
    if first >= tl.load(table + 4 * (program % (2 * positions)) + 3):
        return
    task, place = program // (2 * positions), program % (2 * positions)
    is_A = place < positions
    position = tl.where(is_A, place, place - positions)
    pair = task * positions + position
    # In float64, where no third power of a scale underflows.
    scale = tl.load(scales + pair).to(tl.float64)
    h = -tl.load(grad_scales + pair).to(tl.float64) * scale * scale * scale
    if SOFT:
        c = tl.load(bounds + task * stride_task + position * stride_position).to(tl.float64)
        h = h / (c * c)
        if is_A & (first == 0):
            grad = tl.load(grad_scales + pair).to(tl.float64) * scale * (1 - scale * scale) / c
            tl.store(grad_bounds + pair, grad.to(tl.float32))
    rows = tl.arange(0, R_PADDED)
    square = (rows < R)[:, None] & (rows < R)[None, :]
    other = (program + tl.where(is_A, positions, -positions)).to(tl.int64)
    gram = tl.load(grams + other * R * R + rows[:, None] * R + rows[None, :], mask=square, other=0.0)
    _tile_gradient(
        tensors, gradients, table, program, 2 * positions, first, (h * gram).to(tl.float32),
        R, R_PADDED, TILE, ALIGNED, PRECISION,
    )  # fmt: skip


def gram_forward(tensors: Sequence[Tensor], table: Tensor, grams: Tensor) -> None:
    """Fill `grams`, (n, positions, r, r) float32, from contiguous (n, p, r, d); `table` as in ``gram.shape_table``."""
    _gram_forward_kernel[(grams.shape[0] * len(table),)](
        tuple(tensors), table, grams, len(table), **_constants(tensors)
    )


def gram_backward(tensors: Sequence[Tensor], table: Tensor, grad_grams: Tensor, gradients: Sequence[Tensor]) -> None:
    """Fill `gradients`, contiguous and like `tensors`, from contiguous float32 gradients of the Gram matrices."""
    fixed = _constants([*tensors, *gradients])
    _gram_backward_kernel[_tiles(tensors, table, fixed)](
        tuple(tensors), tuple(gradients), table, grad_grams, len(table), **fixed
    )


def scale_forward(
    tensors: Sequence[Tensor], table: Tensor, bounds: Tensor | None, scales: Tensor, grams: Tensor
) -> None:
    """Fill `scales`, (n, pairs), and `grams`, (n, 2·pairs, r, r), float32; bounds (n, pairs), or None for 1/f."""
    _scale_forward_kernel[(scales.numel(),)](
        tuple(tensors),
        table,
        *_bounds(bounds, scales),
        scales,
        grams,
        scales.shape[1],
        SOFT=bounds is not None,
        **_constants(tensors),
    )


def scale_backward(
    tensors: Sequence[Tensor],
    table: Tensor,
    bounds: Tensor | None,
    scales: Tensor,
    grams: Tensor,
    grad_scales: Tensor,
    grad_bounds: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Fill `gradients`, contiguous and like `tensors`, and `grad_bounds`, (n, pairs) float32, if there are bounds."""
    fixed = _constants([*tensors, *gradients])
    _scale_backward_kernel[_tiles(tensors, table, fixed)](
        tuple(tensors),
        tuple(gradients),
        table,
        *_bounds(bounds, scales),
        scales,
        grams,
        grad_scales,
        grad_bounds,
        scales.shape[1],
        SOFT=bounds is not None,
        **fixed,
    )


def constants_of(r: int, is_amd: bool) -> dict[str, Any]:
    """What the kernels are compiled for at a rank."""
    padded = max(16, triton.next_power_of_2(r))
    tile, warps, precision = CONFIGURATIONS[padded]
    # AMD's matrix cores multiply float32 exactly, and know no TF32 in three passes.
    return {
        "R": r,
        "R_PADDED": padded,
        "TILE": tile,
        "PRECISION": "ieee" if is_amd else precision,
        "num_warps": warps,
    }


def _constants(tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        **constants_of(tensors[0].shape[2], torch.version.hip is not None),
        "ALIGNED": all(tensor.shape[3] % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors),
    }


def _tiles(tensors: Sequence[Tensor], table: Tensor, fixed: dict[str, Any]) -> tuple[int, int]:
    widest = max(tensor.shape[3] for tensor in tensors)
    return tensors[0].shape[0] * len(table), triton.cdiv(widest, fixed["TILE"])


def _bounds(bounds: Tensor | None, scales: Tensor) -> tuple[Tensor, int, int]:
    # Without bounds nothing is read.
    return (scales, 0, 0) if bounds is None else (bounds, bounds.stride(0), bounds.stride(1))
