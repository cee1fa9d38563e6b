"""Triton kernels for Gram matrices of many matrices of different widths; imported only where they run.

One program per matrix in the forward kernel, so there is nothing to combine between programs: one launch, and the same
bits on every run. Each reads its ``r`` rows once, in tiles, and accumulates in float32.
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
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _gram_forward_kernel(  # type: ignore[no-untyped-def]
    addresses,
    table,
    grams,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gram matrix of the matrix that the program's row of the table names."""
    program = tl.program_id(0)
    tensor = tl.load(table + 3 * program)
    index = tl.load(table + 3 * program + 1)
    width = tl.load(table + 3 * program + 2)
    start = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # Without these hints the compiler must assume any address, and loads single elements.
        width = tl.multiple_of(width, 16)
        start = tl.multiple_of(start, 16)
    start += index.to(tl.int64) * R * width
    rows = tl.arange(0, R_PADDED)
    columns = tl.arange(0, TILE)
    total = tl.zeros((R_PADDED, R_PADDED), dtype=tl.float32)
    for first in range(0, width, TILE):
        inside = (rows < R)[:, None] & (first + columns < width)[None, :]
        tile = tl.load(start + rows[:, None] * width + first + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(tile, tl.trans(tile), total, input_precision=PRECISION)
    offsets = rows[:, None] * R + rows[None, :]
    stored = (rows < R)[:, None] & (rows < R)[None, :]
    tl.store(grams + program.to(tl.int64) * R * R + offsets, total, mask=stored)


@triton.jit  # type: ignore[untyped-decorator]
def _gram_backward_kernel(  # type: ignore[no-untyped-def]
    addresses,
    gradient_addresses,
    table,
    grad_grams,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of (H + Hᵀ)·X, with H the gradient of X's Gram matrix."""
    program = tl.program_id(0)
    first = tl.program_id(1) * TILE
    tensor = tl.load(table + 3 * program)
    index = tl.load(table + 3 * program + 1)
    width = tl.load(table + 3 * program + 2)
    if first >= width:
        return
    start = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    target = tl.load(gradient_addresses + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        width = tl.multiple_of(width, 16)
        start = tl.multiple_of(start, 16)
        target = tl.multiple_of(target, 16)
    rows = tl.arange(0, R_PADDED)
    columns = first + tl.arange(0, TILE)
    square = (rows < R)[:, None] & (rows < R)[None, :]
    gradient = grad_grams + program.to(tl.int64) * R * R
    direct = tl.load(gradient + rows[:, None] * R + rows[None, :], mask=square, other=0.0)
    transposed = tl.load(gradient + rows[None, :] * R + rows[:, None], mask=square, other=0.0)
    inside = (rows < R)[:, None] & (columns < width)[None, :]
    offsets = index.to(tl.int64) * R * width + rows[:, None] * width + columns[None, :]
    tile = tl.load(start + offsets, mask=inside, other=0.0)
    result = tl.dot(direct + transposed, tile.to(tl.float32), input_precision=PRECISION)
    tl.store(target + offsets, result.to(DTYPE), mask=inside)


def forward(tensors: Sequence[Tensor], table: Tensor, grams: Tensor) -> None:
    """Fill `grams`, (matrices, r, r) float32, from contiguous (n, r, d) tensors; int32 rows (tensor, index, d)."""
    _gram_forward_kernel[(len(table),)](_addresses(tensors), table, grams, **_constants(tensors))


def backward(tensors: Sequence[Tensor], table: Tensor, grad_grams: Tensor, gradients: Sequence[Tensor]) -> None:
    """Fill `gradients`, contiguous and like `tensors`, from contiguous float32 gradients of the Gram matrices."""
    constants = _constants([*tensors, *gradients])
    tiles = triton.cdiv(max(tensor.shape[2] for tensor in tensors), constants["TILE"])
    _gram_backward_kernel[(len(table), tiles)](
        _addresses(tensors), _addresses(gradients), table, grad_grams, **constants
    )


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    # Created on the device, the tensor would be waited for.
    return torch.tensor([tensor.data_ptr() for tensor in tensors]).to(tensors[0].device, non_blocking=True)


def _constants(tensors: Sequence[Tensor]) -> dict[str, Any]:
    r = tensors[0].shape[1]
    padded = max(16, triton.next_power_of_2(r))
    tile, warps, precision = CONFIGURATIONS[padded]
    return {
        "R": r,
        "R_PADDED": padded,
        "TILE": tile,
        "DTYPE": TRITON_DTYPES[tensors[0].dtype],
        "ALIGNED": all(tensor.shape[2] % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors),
        "PRECISION": precision,
        "num_warps": warps,
    }
