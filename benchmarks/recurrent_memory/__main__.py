"""A recurrent network that must remember, its recurrent weight normalised or not.

Run as `python -m benchmarks.recurrent_memory`. The task is the adding problem of Hochreiter and Schmidhuber
(1997) in the form of Arjovsky et al. (2016): each step brings a number from [0, 1] and a mark; two steps are marked,
one in each half of the sequence, and the output after the last step should be the sum of their numbers. Always to
answer 1 has the mean squared error 1/6, the chance baseline.

The network has 64 rectified units, and is trained with Adam at a constant rate on new sequences at each step. (With
tanh, the medians of three unnormalised and of three torch-orthogonal networks stayed at chance for 1500 steps of length
50; units and task were chosen by these two arms.) Arms differ in the network's recurrent weight W, which is normalised
once per batch, and not at every time step. But for PyTorch's default start, all arms start at the same function, with
the same random orthogonal recurrent matrix: ``spectral`` (largest singular value 1), ``whitening`` and torch's
``orthogonal`` (all singular values 1) map it to itself; the W of ``soft_frobenius``, whose bound is twice the norm of
an orthogonal matrix, is scaled up so that what is left of it is orthogonal.

The seeds of an arm are trained at the same time as a batch of networks that do not see each other. A run has solved the
task at the first step where the mean loss of the last 50 batches is below 0.02, an eighth of chance. From a step whose
loss or gradient is not finite on, it gets no more gradients. The final loss is that of 1000 sequences of their own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.common.rows import save_rows
from benchmarks.recurrent_memory.report import SOLVED, Row, plot, print_table
from hyperadapt.nn import MatrixNorm

LENGTHS, RATES, SEEDS, STEPS = (50, 100), (1e-3, 1e-2), 5, 1500
HIDDEN, BATCH, EVALUATION = 64, 32, 1000
WINDOW = 50
CLIP = 1.0
BOUND = 2 * math.sqrt(HIDDEN)
FAST: dict[str, Any] = {"lengths": [6], "rates": [1e-3, 1e-2], "seeds": 2, "steps": 3}


class Arm(NamedTuple):
    """How one arm differs.

    Attributes:
        normalize: Registers what normalises the weight ``recurrent`` of a module.
        orthogonal_start: Whether the recurrent matrix starts orthogonal, or as in ``torch.nn.RNN``.
        start_norm: Frobenius norm of the orthogonal start's W.
        clip: Largest norm of the gradient; None does not clip.
    """

    normalize: Callable[[nn.Module], object] = lambda networks: None
    orthogonal_start: bool = True
    start_norm: float = math.sqrt(HIDDEN)
    clip: float | None = None


def _matrix_norm(method: str, **options: Any) -> Callable[[nn.Module], object]:
    return lambda networks: register_parametrization(networks, "recurrent", MatrixNorm(method, **options))


ARMS = {
    "none, default start": Arm(orthogonal_start=False),
    "none": Arm(),
    "none, clipped": Arm(clip=CLIP),
    "torch orthogonal": Arm(lambda networks: orthogonal(networks, "recurrent")),
    "spectral": Arm(_matrix_norm("spectral")),
    "whitening": Arm(_matrix_norm("whitening")),
    # f / √(1 + f² / bound²) = √HIDDEN.
    "soft_frobenius": Arm(_matrix_norm("soft_frobenius", bound=BOUND), start_norm=(1 / HIDDEN - 1 / BOUND**2) ** -0.5),
}


class Networks(nn.Module):
    """A batch of independent recurrent networks, one for each seed; all parameters have the seeds first.

    Args:
        arm: What to do with the recurrent weight.
        seeds: How many.
    """

    recurrent: Tensor
    input: Tensor
    bias: Tensor
    output: Tensor
    output_bias: Tensor

    def __init__(self, arm: Arm, seeds: int) -> None:
        super().__init__()
        drawn = [_start(arm, seed) for seed in range(seeds)]
        for name in drawn[0]:
            self.register_parameter(name, nn.Parameter(torch.stack([weights[name] for weights in drawn])))
        arm.normalize(self)

    def forward(self, sequences: Tensor) -> Tensor:
        """Read sequences.

        Args:
            sequences: Shape ``(seeds, batch, length, 2)``.

        Returns:
            What the networks take for the sums, shape ``(seeds, batch)``.
        """
        recurrent = self.recurrent.mT
        inputs = sequences @ self.input.mT.unsqueeze(1) + self.bias[:, None, None]
        state = torch.zeros_like(inputs[:, :, 0])
        for step in inputs.unbind(2):
            state = torch.baddbmm(step, state, recurrent).relu()
        return (state @ self.output.mT).squeeze(-1) + self.output_bias


def _start(arm: Arm, seed: int) -> dict[str, Tensor]:
    """Weights of one network, as `torch.nn.RNN` and `Linear` start, but for the recurrent matrix and the bias."""
    torch.manual_seed(seed)
    cell, head = nn.RNN(2, HIDDEN).state_dict(), nn.Linear(HIDDEN, 1).state_dict()
    rotation = nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN), gain=arm.start_norm / math.sqrt(HIDDEN))
    return {
        "recurrent": rotation if arm.orthogonal_start else cell["weight_hh_l0"],
        "input": cell["weight_ih_l0"],
        "bias": torch.zeros(HIDDEN),
        "output": head["weight"],
        "output_bias": head["bias"],
    }


def adding_problem(sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences and their sums.

    Args:
        sequences: How many.
        length: Steps of each.
        generator: Of random numbers.

    Returns:
        Numbers and marks, shape ``(sequences, length, 2)``, and sums, shape ``(sequences,)``.
    """
    numbers, marks = torch.rand(sequences, length, generator=generator), torch.zeros(sequences, length)
    half = length // 2
    marks.scatter_(1, torch.randint(half, (sequences, 1), generator=generator), 1.0)
    marks.scatter_(1, torch.randint(half, length, (sequences, 1), generator=generator), 1.0)
    return torch.stack((numbers, marks), -1), (numbers * marks).sum(1)


def train(networks: Networks, arm: Arm, rate: float, length: int, steps: int) -> tuple[Tensor, Tensor]:
    """Train, each network on batches of its own seed.

    Args:
        networks: The networks.
        arm: The arm.
        rate: Learning rate.
        length: Of the sequences.
        steps: How many.

    Returns:
        Losses, and norms of the gradient before clipping, both of shape ``(steps, seeds)``.
    """
    parameters = list(networks.parameters())
    optimizer = torch.optim.Adam(parameters, rate)
    seeds = len(parameters[0])
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    alive = torch.ones(seeds, dtype=torch.bool)
    losses, norms = [], []
    for _ in range(steps):
        loss = _losses(networks, [adding_problem(BATCH, length, generator) for generator in generators])
        gradients = torch.autograd.grad(loss.sum(), parameters)
        norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        alive &= loss.detach().isfinite() & norm.isfinite()
        factor = torch.ones(seeds) if arm.clip is None else (arm.clip / norm).clamp(max=1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            shape = (seeds, *[1] * (gradient.ndim - 1))
            parameter.grad = torch.where(alive.view(shape), gradient * factor.view(shape), 0)
        optimizer.step()
        losses.append(loss.detach())
        norms.append(norm)
    return torch.stack(losses), torch.stack(norms)


def _losses(networks: Networks, drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared error of each network on sequences of its own."""
    sequences, sums = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
    predictions: Tensor = networks(sequences)
    return (predictions - sums).square().mean(1)


def run(name: str, rate: float, length: int, seeds: int, steps: int) -> list[Row]:
    """Train and measure one arm at one rate and length.

    Args:
        name: Of the arm.
        rate: Learning rate.
        length: Of the sequences.
        seeds: How many.
        steps: Of training.

    Returns:
        A row for each seed, with None for what is not finite.
    """
    started = time.perf_counter()
    networks = Networks(ARMS[name], seeds)
    losses, norms = train(networks, ARMS[name], rate, length, steps)
    with torch.no_grad():
        test = adding_problem(EVALUATION, length, torch.Generator().manual_seed(seeds))
        final = _losses(networks, [test] * seeds)
    seconds = round((time.perf_counter() - started) / seeds, 2)
    rows = []
    for seed in range(seeds):
        finite = bool((losses[:, seed].isfinite() & norms[:, seed].isfinite()).all() and final[seed].isfinite())
        rows.append(
            {
                "length": length,
                "arm": name,
                "rate": rate,
                "seed": seed,
                "steps": steps,
                "final_loss": float(final[seed]) if finite else None,
                "steps_to_solve": steps_to_solve(losses[:, seed]),
                "finite": finite,
                "largest_gradient": max(filter(math.isfinite, norms[:, seed].tolist()), default=None),
                "seconds": seconds,
            }
        )
    return rows


def steps_to_solve(losses: Tensor) -> int | None:
    """Steps until the mean loss of a window is below the threshold.

    Args:
        losses: Of each step, shape ``(steps,)``.

    Returns:
        How many; None if that never happens.
    """
    if len(losses) < WINDOW:
        return None
    hits = (losses.unfold(0, WINDOW, 1).mean(1) < SOLVED).nonzero()
    return int(hits[0]) + WINDOW if len(hits) else None


def main() -> None:
    """Run all, print the table, and save rows and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fast", action="store_true", help="short sequences, two seeds, three steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/recurrent_memory"))
    parser.add_argument("--results", type=Path, help="folder of the files; by default --output")
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    torch.set_num_threads(1)
    folder = options.results or options.output
    rows: list[Row] = []
    for length, name, rate in itertools.product(options.lengths, ARMS, options.rates):
        rows += run(name, rate, length, options.seeds, options.steps)
    print_table(rows)
    save_rows(folder / "recurrent_memory.jsonl", rows)
    plot(rows, folder)


if __name__ == "__main__":
    main()
