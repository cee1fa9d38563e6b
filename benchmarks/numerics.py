"""Error of every normalisation against float64, over hard spectra: `python -m benchmarks.numerics`.

The error is ‖B·(S - S₆₄)·A‖_F / ‖B·S₆₄·A‖_F, where S₆₄ is the core of the same rounded factors in float64. It is the
largest over seeds; "-" marks a case where both updates are zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rows import save_rows
from hyperadapt import normalize
from hyperadapt.normalization.formulas import METHODS, NORMALIZATIONS

R, IN, OUT, SEEDS = 8, 256, 192, 15
DTYPES = (torch.float32, torch.bfloat16)


def graded(condition: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """Factors whose singular values fall geometrically.

    Args:
        condition: Condition number of each factor.

    Returns:
        A function that draws ``lora_A`` and ``lora_B`` in float64.
    """

    def draw() -> tuple[Tensor, Tensor]:
        values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), R, dtype=torch.float64)
        rotations = [torch.linalg.qr(torch.randn(R, R, dtype=torch.float64))[0] for _ in range(2)]
        rows = torch.linalg.qr(torch.randn(IN, R, dtype=torch.float64))[0].mT
        columns = torch.linalg.qr(torch.randn(OUT, R, dtype=torch.float64))[0]
        return rotations[0] @ (values[:, None] * rows), (columns * values) @ rotations[1]

    return draw


def rank_deficient() -> tuple[Tensor, Tensor]:
    """Factors of rank R - 2.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    lora_A, lora_B = graded(10)()
    lora_A[-2:] = lora_A[:2]
    lora_B[:, -2:] = lora_B[:, :2]
    return lora_A, lora_B


def zero() -> tuple[Tensor, Tensor]:
    """A usual A and a zero B, as training starts.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    return graded(10)()[0], torch.zeros(OUT, R, dtype=torch.float64)


def cancelling() -> tuple[Tensor, Tensor]:
    """Large factors whose product nearly cancels: the halves differ by one part in a thousand.

    Returns:
        ``lora_A`` and ``lora_B`` in float64.
    """
    lora_A, lora_B = (torch.randn(shape, dtype=torch.float64) for shape in ((R, IN), (OUT, R)))
    half = R // 2
    lora_A[half:] = -lora_A[:half] + 1e-3 * lora_A[half:]
    lora_B[:, half:] = lora_B[:, :half] + 1e-3 * lora_B[:, half:]
    return lora_A, lora_B


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
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


def largest_error(method: str, draw: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype) -> float | None:
    """Largest relative error over seeds.

    Args:
        method: The normalisation.
        draw: Draws the factors.
        dtype: What the factors are rounded to.

    Returns:
        The error, dimensionless; None if both updates are zero; infinite if only one is, or a core is not finite.
    """
    errors = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        lora_A, lora_B = (factor.to(dtype) for factor in draw())
        needed = {"bound": 0.5, "logits": torch.randn(R, R) + 4 * torch.eye(R)}
        options = {name: needed[name] for name in METHODS[method].needs}
        core = normalize(lora_A, lora_B, method, **options).double()
        exact = normalize(lora_A.double(), lora_B.double(), method, **options)
        if not core.isfinite().all():
            return float("inf")
        size = torch.linalg.matrix_norm(lora_B.double() @ exact @ lora_A.double())
        error = torch.linalg.matrix_norm(lora_B.double() @ (core - exact) @ lora_A.double())
        if size == 0:
            if error > 0:
                return float("inf")
            continue
        errors.append(float(error / size))
    return max(errors, default=None)


def main() -> None:
    """Print a table for each dtype, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/numerics"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        print(f"\nfactors in {dtype}, r = {R}, in = {IN}, out = {OUT}: largest relative error over {SEEDS} seeds")
        print(f"{'':<16}" + "".join(f"{case:>11}" for case in CASES))
        for method in NORMALIZATIONS:
            errors = {case: largest_error(method, draw, dtype) for case, draw in CASES.items()}
            print(f"{method:<16}" + "".join(f"{'-' if e is None else f'{e:.1e}':>11}" for e in errors.values()))
            rows.append({"dtype": str(dtype), "method": method, "r": R, "in": IN, "out": OUT} | errors)
    save_rows(options.output / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
