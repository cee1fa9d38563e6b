"""Error of every normalisation against float64, over hard spectra: `python -m benchmarks.numerics`.

The error is ‖B·(S - S₆₄)·A‖_F / ‖B·S₆₄·A‖_F, where S₆₄ is the core of the same rounded factors in float64, and that of
the gradients of A and of B likewise, the larger of the two. It is the largest over seeds; "-" marks a case where both
sides are zero. `TRITON_INTERPRET=1 python -m benchmarks.numerics --kernels --seeds 2` has the kernels instead; `--ranks
4 16 64` has other ranks.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.rows import save_rows
from hyperadapt import normalize
from hyperadapt.normalization import cores, gram
from hyperadapt.normalization.formulas import METHODS, NORMALIZATIONS

IN, OUT = 256, 192
DTYPES = (torch.float32, torch.bfloat16)
# Draws ``lora_A`` and ``lora_B`` of a rank in float64.
Draw = Callable[[int], tuple[Tensor, Tensor]]


def graded(condition: float) -> Draw:
    """Factors whose singular values fall geometrically.

    Args:
        condition: Condition number of each factor.

    Returns:
        What draws them.
    """

    def draw(r: int) -> tuple[Tensor, Tensor]:
        values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
        rotations = [torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for _ in range(2)]
        rows = torch.linalg.qr(torch.randn(IN, r, dtype=torch.float64))[0].mT
        columns = torch.linalg.qr(torch.randn(OUT, r, dtype=torch.float64))[0]
        return rotations[0] @ (values[:, None] * rows), (columns * values) @ rotations[1]

    return draw


def rank_deficient(r: int) -> tuple[Tensor, Tensor]:
    """Factors of two ranks less.

    Args:
        r: The rank they could have.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    lora_A, lora_B = graded(10)(r)
    lora_A[-2:] = lora_A[:2]
    lora_B[:, -2:] = lora_B[:, :2]
    return lora_A, lora_B


def zero(r: int) -> tuple[Tensor, Tensor]:
    """A usual A and a zero B, as training starts.

    Args:
        r: Rank.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    return graded(10)(r)[0], torch.zeros(OUT, r, dtype=torch.float64)


def cancelling(r: int) -> tuple[Tensor, Tensor]:
    """Large factors whose product nearly cancels: the halves differ by one part in a thousand.

    Args:
        r: Rank.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    lora_A, lora_B = (torch.randn(shape, dtype=torch.float64) for shape in ((r, IN), (OUT, r)))
    half = r // 2
    lora_A[half:] = -lora_A[:half] + 1e-3 * lora_A[half:]
    lora_B[:, half:] = lora_B[:, :half] + 1e-3 * lora_B[:, half:]
    return lora_A, lora_B


CASES: dict[str, Draw] = {
    "repeated": graded(1),
    "1e1": graded(1e1),
    "1e2": graded(1e2),
    "1e3": graded(1e3),
    "1e4": graded(1e4),
    "1e6": graded(1e6),
    "deficient": rank_deficient,
    "zero": zero,
    "cancelling": cancelling,
}


def largest_errors(
    method: str, draw: Draw, r: int, dtype: torch.dtype, seeds: int
) -> tuple[float | None, float | None]:
    """Largest relative errors over seeds.

    Args:
        method: The normalisation.
        draw: Draws the factors.
        r: Rank.
        dtype: What the factors are rounded to.
        seeds: Number of draws.

    Returns:
        The errors of the update and of its gradients, dimensionless; None if what is compared is zero on both sides;
        infinite if only one is, or something is not finite.
    """
    errors = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        lora_A, lora_B = (factor.to(dtype) for factor in draw(r))
        needed = {"bound": 0.5, "logits": torch.randn(r, r) + 4 * torch.eye(r)}
        options = {name: needed[name] for name in METHODS[method].needs}
        direction = torch.randn(OUT, IN, dtype=torch.float64)
        core, *gradients = core_and_gradients(lora_A, lora_B, method, options, direction)
        exact, *exact_gradients = core_and_gradients(lora_A.double(), lora_B.double(), method, options, direction)
        outer, inner = lora_B.double(), lora_A.double()
        value = relative_error(outer @ core @ inner, outer @ exact @ inner)
        pairs = zip(gradients, exact_gradients, strict=True)
        found = [error for error in (relative_error(*pair) for pair in pairs) if error is not None]
        errors.append((value, max(found, default=None)))
    values, slopes = ([error for error in column if error is not None] for column in zip(*errors, strict=True))
    return max(values, default=None), max(slopes, default=None)


def core_and_gradients(
    lora_A: Tensor, lora_B: Tensor, method: str, options: dict[str, object], direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The core, and the gradients of ⟨direction, B·S·A⟩ with the products around the core in float64.

    Args:
        lora_A: Shape ``(r, in)``.
        lora_B: Shape ``(out, r)``.
        method: The normalisation.
        options: Its options.
        direction: Shape ``(out, in)``.

    Returns:
        The core and the gradients of A and B, float64.
    """
    lora_A, lora_B = lora_A.clone().requires_grad_(), lora_B.clone().requires_grad_()
    core = normalize(lora_A, lora_B, method, **options).double()  # type: ignore[arg-type]
    update = lora_B.double() @ core @ lora_A.double()
    grad_A, grad_B = torch.autograd.grad(update, (lora_A, lora_B), direction)
    return core.detach(), grad_A.double(), grad_B.double()


def relative_error(actual: Tensor, exact: Tensor) -> float | None:
    """Norm of a difference over the exact matrix's.

    Args:
        actual: A matrix.
        exact: What it should be.

    Returns:
        The error; None if both are zero, infinite if only one is, or something is not finite.
    """
    size, error = torch.linalg.matrix_norm(exact), torch.linalg.matrix_norm(actual - exact)
    if not error.isfinite():
        return float("inf")
    if size == 0:
        return float("inf") if error > 0 else None
    return float(error / size)


def serve_kernels() -> None:
    """Let kernels serve on the CPU, where Triton interprets them; its interpreter multiplies bfloat16 wrongly."""
    for module in (gram, cores):
        module.kernels_serve = lambda tensor: tensor.dtype == torch.float32  # type: ignore[attr-defined]


def main() -> None:
    """Print a table for each dtype, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--methods", nargs="+", choices=NORMALIZATIONS, default=list(NORMALIZATIONS))
    parser.add_argument("--kernels", action="store_true", help="the kernels, in Triton's interpreter: slow")
    parser.add_argument("--output", type=Path, default=Path("runs/numerics"))
    options = parser.parse_args()
    if options.kernels and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--kernels needs TRITON_INTERPRET=1 in the environment")
    if options.kernels:
        serve_kernels()
    torch.set_num_threads(1)
    rows = []
    for r, dtype in itertools.product(options.ranks, DTYPES[:1] if options.kernels else DTYPES):
        print(
            f"\nfactors in {dtype}, r = {r}, in = {IN}, out = {OUT}: largest relative error over {options.seeds} seeds"
        )
        print(f"{'':<27}" + "".join(f"{case:>11}" for case in CASES), flush=True)
        for method in options.methods:
            errors = {case: largest_errors(method, draw, r, dtype, options.seeds) for case, draw in CASES.items()}
            for place, kind in enumerate(("update", "gradients")):
                found = {case: both[place] for case, both in errors.items()}
                texts = "".join(f"{'-' if e is None else f'{e:.1e}':>11}" for e in found.values())
                print(f"{method:<16}{kind:<11}{texts}", flush=True)
                row = {
                    "dtype": str(dtype),
                    "method": method,
                    "of": kind,
                    "r": r,
                    "in": IN,
                    "out": OUT,
                    "seeds": options.seeds,
                }
                rows.append(row | {"by": "kernels" if options.kernels else "formulas"} | found)
            # What is stopped leaves what it has computed.
            save_rows(options.output / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
