"""Triton kernels for cores that are inverse square roots, from Gram matrices; imported only where they run.

One program per pair. `grams` holds, of each task, first the Gram matrices of all A and then those of all B.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyperadapt.normalization.matrix_triton import (
    identity_matrix,
    inner_product,
    inverse_of,
    inverse_root,
    load_matrix,
    load_transposed,
    multiply,
    not_negative,
    plus_diagonal,
    solve_sylvester,
    store_matrix,
    trace_of,
)


@triton.jit  # type: ignore[untyped-decorator]
def soft_polar_forward_kernel(  # type: ignore[no-untyped-def]
    grams, bounds, stride_task, stride_position, cores, roots, shifts, pairs, R: tl.constexpr, P: tl.constexpr
):
    """S = (I + K)^(-1/2) for K = G_A·G_B·r/bound².

    The eigenvalues of K are σ²/c² of the update, and rounding in the Gram matrices adds up to about 1e-7 of their size,
    1e-4 where tensor cores cut off. So in place of I stands shift·I, with a shift of 1 or, if that is more, a share of
    |G_A|·|G_B|·r/bound²: 1e-10, and more where rounding left an eigenvalue negative and the iteration fails.
    """
    program = tl.program_id(0).to(tl.int64)
    task, position = program // pairs, program % pairs
    gram_A = grams + (task * 2 * pairs + position) * R * R
    gram_B = gram_A + pairs * R * R
    bound = tl.load(bounds + task * stride_task + position * stride_position).to(tl.float64)
    weight = R / (bound * bound)
    A, B = load_matrix(gram_A, R, P), load_matrix(gram_B, R, P)
    trace = not_negative(inner_product(A, B) * weight)
    size = tl.sqrt(inner_product(A, A)) * tl.sqrt(inner_product(B, B)) * weight
    inverse, shift = identity_matrix(P), trace * 0
    share, residual = size * 0 + 1e-13, size * 0 + 1.0
    # Not below, also where it is not a number.
    while (share < 1e-2) & ((residual < 1e-6) == 0):
        share = share * 1000
        shift = tl.maximum(1.0, share * size)
        total = shift + trace
        # Read anew, so that they take no registers while the iteration runs.
        product = multiply(load_matrix(gram_A, R, P) * (weight / total), load_matrix(gram_B, R, P))
        inverse, residual = inverse_root(plus_diagonal(product, shift / total, P), tl.sqrt(shift / total), P)
    inverse = inverse / tl.sqrt(shift + trace)
    store_matrix(cores + program * R * R, inverse, R, P)
    store_matrix(roots + program * R * R, inverse, R, P)
    tl.store(shifts + program, shift)


@triton.jit  # type: ignore[untyped-decorator]
def soft_polar_backward_kernel(  # type: ignore[no-untyped-def]
    grams, bounds, stride_task, stride_position, roots, shifts, grad_cores, grad_grams, grad_bounds, scratch, pairs,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """H_A = G_B·X·w, H_B = X·G_A·w and -2·tr(X·K)/bound, with w = r/bound² and X·T + T·X = -S·gᵀ·S for T = S⁻¹.

    For dS = -S·dT·S and dK = T·dT + dT·T; X is the transposed gradient of K = w·G_A·G_B, and T = (K + shift·I)·S.
    """
    program = tl.program_id(0).to(tl.int64)
    task, position = program // pairs, program % pairs
    place_A = (task * 2 * pairs + position) * R * R
    place_B = place_A + pairs * R * R
    bound = tl.load(bounds + task * stride_task + position * stride_position).to(tl.float64)
    weight = R / (bound * bound)
    shift = tl.load(shifts + program)
    total = shift + not_negative(
        inner_product(load_matrix(grams + place_A, R, P), load_matrix(grams + place_B, R, P)) * weight
    )
    half = tl.sqrt(total)
    # In units of the largest eigenvalue, half² = total.
    core = roots + program * R * R
    scratch += program * 2 * P * P
    root = multiply(load_matrix(grams + place_A, R, P) * (weight / half), load_matrix(grams + place_B, R, P))
    store_matrix(scratch, multiply(plus_diagonal(root, shift / half, P), load_matrix(core, R, P)), P, P)
    right = multiply(load_transposed(grad_cores + program * R * R, R, P), load_matrix(core, R, P))
    store_matrix(scratch + P * P, multiply(load_matrix(core, R, P), right) * (-1 / half), P, P)
    X = solve_sylvester(scratch, tl.sqrt(shift / total), P)
    grad_A = multiply(load_matrix(grams + place_B, R, P), load_matrix(X, P, P)) * (weight / 2)
    store_matrix(grad_grams + place_A, grad_A, R, P)
    tl.store(
        grad_bounds + program, (-2 / bound * inner_product(grad_A, load_matrix(grams + place_A, R, P))).to(tl.float32)
    )
    grad_B = multiply(load_matrix(X, P, P), load_matrix(grams + place_A, R, P)) * (weight / 2)
    store_matrix(grad_grams + place_B, grad_B, R, P)


@triton.jit  # type: ignore[untyped-decorator]
def _whiten(gram, root, shift_of, ridge, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store and return (G + shift·I)^(-1/2), zero for zero; the shift is ridge·tr(G)/r, or more where that fails."""
    G = load_matrix(gram, R, P)
    trace = trace_of(G, P)
    unit = inverse_of(trace)
    inverse, residual, share, low = identity_matrix(P), trace * 0 + 1.0, trace * 0 + ridge / R / 1000, trace * 0
    # Not below, also where it is not a number.
    while (share < 1e-2) & ((residual < 1e-6) == 0):
        share = share * 1000
        low = tl.sqrt(share / (1 + share))
        inverse, residual = inverse_root(
            plus_diagonal(load_matrix(gram, R, P) * (unit / (1 + share)), low * low, P), low, P
        )
    # NaN for NaN.
    inverse = inverse * tl.where(trace > 0, tl.sqrt(unit / (1 + share)), trace)
    store_matrix(root, inverse, R, P)
    tl.store(shift_of, share)
    return inverse


@triton.jit  # type: ignore[untyped-decorator]
def whitening_forward_kernel(  # type: ignore[no-untyped-def]
    grams, ridge, cores, roots, shifts, pairs, R: tl.constexpr, P: tl.constexpr, BOTH: tl.constexpr
):
    """(G_B + ε·I)^(-1/2)·(G_A + ε·I)^(-1/2), or the second factor alone; each ε is the ridge in units of tr(G)/r."""
    program = tl.program_id(0).to(tl.int64)
    place = (program // pairs) * 2 * pairs + program % pairs
    core = _whiten(grams + place * R * R, roots + place * R * R, shifts + place, ridge, R, P)
    if BOTH:
        place += pairs
        core = multiply(_whiten(grams + place * R * R, roots + place * R * R, shifts + place, ridge, R, P), core)
    store_matrix(cores + program * R * R, core, R, P)


@triton.jit  # type: ignore[untyped-decorator]
def _unwhiten(gram, root, share, scratch, R: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of G from X·gᵀ·X in `scratch`, where X = (G + shift·I)^(-1/2) has the gradient g.

    The gradient Y of G + shift·I solves Y·T + T·Y = -X·gᵀ·X for T = X⁻¹; a shift of share·tr(G) adds share·tr(Y)·I.
    """
    G = load_matrix(gram, R, P)
    trace = trace_of(G, P)
    low = tl.sqrt(share / (1 + share))
    # In units of the largest eigenvalue of T.
    half = tl.sqrt(trace * (1 + share))
    inverse_half = inverse_of(half)
    T = multiply(plus_diagonal(G * inverse_half, share * trace * inverse_half, P), load_matrix(root, R, P))
    store_matrix(scratch, tl.where(trace > 0, T, identity_matrix(P)), P, P)
    Y = load_matrix(solve_sylvester(scratch, low, P), P, P) * (-inverse_half / 2)
    # The place may be written again.
    tl.debug_barrier()
    return plus_diagonal(Y, share * trace_of(Y, P), P)


@triton.jit  # type: ignore[untyped-decorator]
def whitening_backward_kernel(  # type: ignore[no-untyped-def]
    grams, roots, shifts, grad_cores, grad_grams, scratch, pairs, R: tl.constexpr, P: tl.constexpr, BOTH: tl.constexpr
):
    """Gradients of G_A and G_B: of X_B·X_A with gradient g, X_B has the gradient g·X_A and X_A has X_B·g."""
    program = tl.program_id(0).to(tl.int64)
    place_A = (program // pairs) * 2 * pairs + program % pairs
    place_B = place_A + pairs
    root_A, root_B = roots + place_A * R * R, roots + place_B * R * R
    grad = grad_cores + program * R * R
    scratch += program * 2 * P * P
    right = multiply(load_matrix(root_A, R, P), load_transposed(grad, R, P))
    if BOTH:
        right = multiply(right, load_matrix(root_B, R, P))
    store_matrix(scratch + P * P, multiply(right, load_matrix(root_A, R, P)), P, P)
    H = _unwhiten(grams + place_A * R * R, root_A, tl.load(shifts + place_A), scratch, R, P)
    store_matrix(grad_grams + place_A * R * R, H, R, P)
    if BOTH:
        right = multiply(load_matrix(root_B, R, P), load_matrix(root_A, R, P))
        right = multiply(right, load_transposed(grad, R, P))
        store_matrix(scratch + P * P, multiply(right, load_matrix(root_B, R, P)), P, P)
        H = _unwhiten(grams + place_B * R * R, root_B, tl.load(shifts + place_B), scratch, R, P)
    else:
        H = H * 0
    store_matrix(grad_grams + place_B * R * R, H, R, P)
