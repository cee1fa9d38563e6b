"""Cost of normalising all adapters of a model: `python -m benchmarks.normalization`.

Arms take turns within each round, in one process; a turn repeats its arm for at least 20 ms. "fused" is what this
package does (kernels on a GPU with Triton, the formulas elsewhere); "grouped" the formulas with one batched product per
shape in plain torch; "compiled" that under torch.compile; "graph", on a GPU, "fused" replayed as a CUDA graph. Times
are in milliseconds, bandwidth counts every factor element once (forward) or read, read again and written (both), and
its share is of a copy of 256 MiB measured in the same run. On a GPU where liger-kernel is installed, its Sinkhorn
kernel is compared with ours on the mixing matrices alone; "plain" is the formula.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.rows import save_rows
from hyperadapt import normalize
from hyperadapt.nn import MatrixNorm
from hyperadapt.normalization.cores import cores
from hyperadapt.normalization.formulas import METHODS
from hyperadapt.normalization.gram import grams_reference
from hyperadapt.normalization.matrix_functions import sinkhorn

# Layers, and (in, out, count) of the linear layers of each.
MODELS = {
    "llama-3-8b": (32, [(4096, 4096, 2), (4096, 1024, 2), (4096, 14336, 2), (14336, 4096, 1)]),
    "qwen2.5-0.5b": (24, [(896, 896, 2), (896, 128, 2), (896, 4864, 2), (4864, 896, 1)]),
}
TURN_MS = 20.0
Arm = Callable[[], object]


def quantiles(arms: dict[str, Arm], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time arms in turns.

    Args:
        arms: What to time, by name.
        rounds: Measured turns of each arm.
        device: Where the arms run.

    Returns:
        The 20th, 50th and 80th percentile of each arm over its turns, in milliseconds per call.
    """

    def turn(arm: Arm, calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            arm()
        synchronize(device)
        return 1e3 * (time.perf_counter() - started) / calls

    for arm in arms.values():
        turn(arm, 2)
    calls = {name: math.ceil(TURN_MS / turn(arm, 3)) for name, arm in arms.items()}
    times = [{name: turn(arm, calls[name]) for name, arm in arms.items()} for _ in range(rounds)]
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: torch.tensor([t[name] for t in times], dtype=torch.float64).quantile(levels).tolist() for name in arms
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()


def draw_factors(model: str, r: int, tasks: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random factors of all linear layers, as the hypernetwork emits them: A and Bᵀ of each shape.

    Args:
        model: Name of the model.
        r: Rank.
        tasks: Number of tasks.
        dtype: Their dtype.
        device: Their device.

    Returns:
        First the A of each shape, ``(tasks, positions, r, in)``, then the Bᵀ, ``(tasks, positions, r, out)``.
    """
    layers, shapes = MODELS[model]
    counts = [layers * count for _, _, count in shapes]
    widths = [[in_features for in_features, _, _ in shapes], [out_features for _, out_features, _ in shapes]]
    return [
        torch.randn(tasks, count, r, width, device=device).to(dtype).requires_grad_()
        for side in widths
        for count, width in zip(counts, side, strict=True)
    ]


def graphed(arm: Arm) -> Arm:
    """Replay of an arm as a CUDA graph.

    Args:
        arm: What to capture; its inputs must stay where they are.

    Returns:
        The replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            arm()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


def whole_model(
    model: str, r: int, tasks: int, method: str, options: argparse.Namespace, device: torch.device
) -> list[dict[str, object]]:
    """Time all adapters of a model.

    Args:
        model: Name of the model.
        r: Rank.
        tasks: Number of tasks.
        method: The normalisation.
        options: Command line options.
        device: The device.

    Returns:
        A row per pass and arm.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    factors = draw_factors(model, r, tasks, dtype, device)
    half, record = len(factors) // 2, METHODS[method]
    pairs = sum(factor.shape[1] for factor in factors[:half])
    needed = {"bound": torch.ones(pairs, device=device), "logits": torch.randn(tasks, pairs, r, r, device=device)}
    given = {**record.options, **{name: needed[name] for name in record.needs}}

    def fused() -> Tensor:
        return cores(factors[:half], factors[half:], record, given)

    def grouped() -> Tensor:
        assert record.core is not None
        return record.core(*grams_reference(factors).chunk(2, dim=1), **given)

    forwards: dict[str, Callable[[], Tensor]] = {"fused": fused, "grouped": grouped}
    if options.compile:
        # Each model is compiled for itself; one after another they would hit the limit of recompilations.
        torch.compiler.reset()
        forwards["compiled"] = torch.compile(grouped)
    direction = torch.randn_like(fused())

    def both(forward: Callable[[], Tensor]) -> Arm:
        return lambda: torch.autograd.grad(forward(), factors, direction)

    buffer = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(buffer)
    copy = quantiles({"copy": lambda: target.copy_(buffer)}, options.rounds, device)["copy"][1]
    bandwidth = 2 * len(buffer) / copy / 1e6
    size = sum(factor.numel() * factor.element_size() for factor in factors)
    rows: list[dict[str, object]] = []
    for name, passes, arms in (
        ("forward", 1, forwards),
        ("forward and backward", 4, {arm: both(forward) for arm, forward in forwards.items()}),
    ):
        timed: dict[str, Arm] = dict(arms)
        if device.type == "cuda":
            timed["graph"] = graphed(timed["fused"])
        measured = quantiles(timed, options.rounds, device)
        for arm, (low, median, high) in measured.items():
            speed = passes * size / median / 1e6
            rows.append(
                {
                    "model": model,
                    "r": r,
                    "tasks": tasks,
                    "method": method,
                    "dtype": str(dtype),
                    "pass": name,
                    "arm": arm,
                }
                | {"p20_ms": low, "p50_ms": median, "p80_ms": high, "gb_per_s": speed, "copy_gb_per_s": bandwidth}
                | {"ratio_to_fused": median / measured["fused"][1]}
            )
    return rows


def single_position(options: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Time one position of 4096 x 4096 at r = 16 against ways that form the dense product.

    Args:
        options: Command line options.
        device: The device.

    Returns:
        A row per arm.
    """
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(16, 4096, device=device), torch.randn(4096, 16, device=device)
    power_step = nn.utils.parametrizations.spectral_norm(nn.Linear(4096, 4096, bias=False, device=device))
    groups: dict[str, dict[str, Arm]] = {
        "frobenius": {
            "fused": lambda: normalize(lora_A, lora_B, "frobenius"),
            "dense norm": lambda: torch.linalg.matrix_norm(lora_B @ lora_A),
        },
        "spectral": {
            "fused": lambda: normalize(lora_A, lora_B, "spectral"),
            "dense, one power step": lambda: power_step.weight,
            "dense svd": lambda: torch.linalg.svdvals(lora_B @ lora_A),
        },
    }
    if options.skip_svd:
        del groups["spectral"]["dense svd"]
    rows: list[dict[str, object]] = []
    for method, arms in groups.items():
        # The svd takes seconds; a few rounds place its median well enough for a ratio of hundreds.
        measured = quantiles(arms, 3 if "dense svd" in arms else options.rounds, device)
        for arm, (low, median, high) in measured.items():
            ratio = median / measured["fused"][1]
            rows.append({"model": "one 4096x4096", "r": 16, "tasks": 1, "method": method, "dtype": "torch.float32"})
            rows[-1] |= {"pass": "forward", "arm": arm, "p20_ms": low, "p50_ms": median, "p80_ms": high}
            rows[-1] |= {"ratio_to_fused": ratio}
    return rows


def mixing_matrices(r: int, count: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Time 20 Sinkhorn iterations on mixing matrices against Liger-Kernel, where that runs.

    Args:
        r: Rank, a power of 2.
        count: Number of matrices.
        options: Command line options.
        device: The device.

    Returns:
        A row per arm.
    """
    logits = torch.randn(count, r, r, device=device)
    mixing = MatrixNorm("sinkhorn")
    arms: dict[str, Arm] = {
        "fused": lambda: mixing(logits),
        "plain": lambda: sinkhorn(logits, iterations=20, temperature=1.0),
    }
    if options.compile:
        compiled = torch.compile(sinkhorn)
        arms["compiled"] = lambda: compiled(logits, iterations=20, temperature=1.0)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        arms["liger"] = lambda: liger_sinkhorn(logits)
    measured = quantiles(arms, options.rounds, device)
    row = {"model": f"{count} mixings", "r": r, "tasks": 1, "method": "sinkhorn", "dtype": "torch.float32"}
    return [
        row
        | {"pass": "forward", "arm": arm, "p20_ms": low, "p50_ms": median, "p80_ms": high}
        | {"ratio_to_fused": median / measured["fused"][1]}
        for arm, (low, median, high) in measured.items()
    ]


def liger_sinkhorn(logits: Tensor) -> Tensor:
    """20 iterations by Liger-Kernel, whose kernel also computes two vectors per matrix that are ignored here.

    Args:
        logits: Shape ``(count, r, r)``, float32, r a power of 2.

    Returns:
        Same shape.
    """
    from liger_kernel.ops.mhc import mhc_split_sinkhorn_fwd

    count, r, _ = logits.shape
    mix = torch.cat([logits.new_zeros(count, 2 * r), logits.flatten(1)], dim=1)
    bias, one = mix.new_zeros(mix.shape[1]), mix.new_ones(1)
    outputs = mhc_split_sinkhorn_fwd(mix, bias, one, one, one, tmax=20, pre_eps=0.0, sinkhorn_eps=0.0, post_mult=1.0)
    mixing: Tensor = outputs[2]
    return mixing


def main() -> None:
    """Measure, print a line per row, and save the rows."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64] if gpu else [16])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 32] if gpu else [1, 8])
    parser.add_argument("--methods", nargs="+", default=["soft_frobenius", "spectral", "soft_polar", "sinkhorn"])
    parser.add_argument("--rounds", type=int, default=30 if gpu else 10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--skip-svd", action="store_true", help="leave the dense svd out: it takes seconds on a CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/normalization"))
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")

    print(f"{'model':<14}{'r':>3}{'tasks':>6} {'method':<15}{'pass':<21}{'arm':<22}", end="")
    print(f"{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'GB/s':>7}{'of copy':>8}{'x fused':>9}", flush=True)
    rows: list[dict[str, object]] = []
    for made in measured(options, device):
        for row in made:
            print_row(row)
        rows += made
        # What is stopped leaves what it has measured.
        save_rows(options.output / "rows.jsonl", rows)


def measured(options: argparse.Namespace, device: torch.device) -> Iterator[list[dict[str, object]]]:
    """Everything that is asked for.

    Args:
        options: The command's options.
        device: The device.

    Yields:
        Rows, as soon as they are measured.
    """
    yield single_position(options, device)
    for r in options.ranks:
        yield mixing_matrices(r, 1792, options, device)
    for model in options.models:
        for r in options.ranks:
            for tasks in options.tasks:
                for method in options.methods:
                    yield whole_model(model, r, tasks, method, options, device)


def print_row(row: dict[str, Any]) -> None:
    """Print a line.

    Args:
        row: The row.
    """
    speed = f"{row['gb_per_s']:>7.0f}{row['gb_per_s'] / row['copy_gb_per_s']:>8.2f}" if "gb_per_s" in row else " " * 15
    print(
        f"{row['model']:<14}{row['r']:>3}{row['tasks']:>6} {row['method']:<15}{row['pass']:<21}{row['arm']:<22}", end=""
    )
    print(
        f"{row['p20_ms']:>9.3f}{row['p50_ms']:>9.3f}{row['p80_ms']:>9.3f}{speed}{row['ratio_to_fused']:>9.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
