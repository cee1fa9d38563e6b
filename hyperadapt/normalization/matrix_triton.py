"""Functions of r×r matrices in Triton kernels, in float64 on tensor cores; imported only where they run.

Those are the only products that lose no bits and keep r = 64 in registers (DECISIONS.md). Roots come from a coupled
Newton-Schulz iteration whose factor in each step follows from a bound on the spectrum (Chen and Chow 2014), so that a
condition number of 1e10 takes 16 steps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def load_matrix(source, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """An r×r matrix in float64, padded with zeros to P×P."""
    i = tl.arange(0, P)
    inside = (i < R)[:, None] & (i < R)[None, :]
    return tl.load(source + i[:, None] * R + i[None, :], mask=inside, other=0.0, volatile=True).to(tl.float64)


@triton.jit  # type: ignore[untyped-decorator]
def load_transposed(source, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same, transposed."""
    i = tl.arange(0, P)
    inside = (i < R)[:, None] & (i < R)[None, :]
    return tl.load(source + i[None, :] * R + i[:, None], mask=inside, other=0.0, volatile=True).to(tl.float64)


@triton.jit  # type: ignore[untyped-decorator]
def store_matrix(target, matrix, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The r×r part of a padded matrix."""
    i = tl.arange(0, P)
    inside = (i < R)[:, None] & (i < R)[None, :]
    tl.store(target + i[:, None] * R + i[None, :], matrix.to(target.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def plus_diagonal(x, number, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """X + number·I."""
    i = tl.arange(0, P)
    return tl.where(i[:, None] == i[None, :], x + number, x)


@triton.jit  # type: ignore[untyped-decorator]
def identity_matrix(P: tl.constexpr):  # type: ignore[no-untyped-def]
    """I, P×P."""
    i = tl.arange(0, P)
    return (i[:, None] == i[None, :]).to(tl.float64)


@triton.jit
def multiply(x, y, plus=None):  # type: ignore[no-untyped-def]
    """X·Y, added to what is given."""
    return tl.dot(x, y, plus, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def inner_product(x, y):  # type: ignore[no-untyped-def]
    """Sum over the products of entries."""
    return tl.sum(tl.sum(x * y, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def trace_of(x, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the diagonal."""
    i = tl.arange(0, P)
    return tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), axis=1), axis=0)


@triton.jit
def not_negative(x):  # type: ignore[no-untyped-def]
    """A number, and 0 for what is below; NaN for NaN, which a maximum would leave out."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def inverse_of(x):  # type: ignore[no-untyped-def]
    """1/x of a number, and 0 for 0."""
    return tl.where(x == 0, 0.0, 1 / tl.where(x == 0, 1.0, x))


@triton.jit
def _factor(low):  # type: ignore[no-untyped-def]
    """Best ρ of a Newton-Schulz step x ↦ ρx(3 - ρ²x²)/2 for x in [low, 1]: it brings them closest to 1."""
    return tl.sqrt(3 / (1 + low + low * low))


@triton.jit  # type: ignore[untyped-decorator]
def inverse_root(matrix, low, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """M^(-1/2) of a matrix with eigenvalues in [low², 1], and the residual, the norm of I - M^(-1/2)·M^(1/2).

    Y → M^(1/2), Z → M^(-1/2) by W = ρ(3 - ρ²·Z·Y)/2, Y ← Y·W, Z ← W·Z. The eigenvalues of (Z·Y)^(1/2) are in [low, 1],
    with a `low` that follows the same polynomial; near 1 each step squares its distance from there.
    """
    root, inverse = matrix, identity_matrix(P)
    while low < 1 - 1e-8:
        rho = _factor(low)
        step = plus_diagonal(multiply(inverse, root) * (-rho * rho * rho / 2), 1.5 * rho, P)
        root = multiply(root, step)
        inverse = multiply(step, inverse)
        low = rho * low * (3 - rho * rho * low * low) / 2
    # A sum, since a maximum would leave NaN out.
    rest = plus_diagonal(multiply(inverse, root), -1.0, P)
    return inverse, tl.sqrt(inner_product(rest, rest))


@triton.jit  # type: ignore[untyped-decorator]
def solve_sylvester(scratch, low, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Place of 2X, where X·T + T·X = F and T has eigenvalues in [low, 1].

    The sign of [[T, F], [0, -T]] is [[I, 2X], [0, -I]], by the same steps as above of a matrix of twice the size:
    F ← ρ(3F - ρ²(T²F - TFT + FT²))/2. T and F, P×P and float64, stand in `scratch`, one after the other, and are
    overwritten: at P = 64 there are no registers for all of them.
    """
    right = scratch + P * P
    tl.debug_barrier()
    while low < 1 - 1e-8:
        rho = _factor(low)
        product = multiply(load_matrix(right, P, P), load_matrix(scratch, P, P))
        inner = multiply(product, load_matrix(scratch, P, P))
        product = multiply(load_matrix(scratch, P, P), load_matrix(right, P, P), -product)
        inner = multiply(load_matrix(scratch, P, P), product, inner)
        inner = (rho / 2) * (3 * load_matrix(right, P, P) - rho * rho * inner)
        # Threads read what others write.
        tl.debug_barrier()
        store_matrix(right, inner, P, P)
        root = load_matrix(scratch, P, P)
        root = multiply(root, plus_diagonal(multiply(root, root) * (-rho * rho * rho / 2), 1.5 * rho, P))
        tl.debug_barrier()
        store_matrix(scratch, root, P, P)
        tl.debug_barrier()
        low = rho * low * (3 - rho * rho * low * low) / 2
    return right
