"""A small GAN whose discriminator's weights are normalised, or are not: `python -m benchmarks.gan`.

Generator and discriminator are perceptrons with two hidden layers of 64 units, the generator's with batch
normalisation. They are trained in turns with the hinge loss and Adam (betas 0.5 and 0.999) on the 8x8 digits of
scikit-learn, at an ordinary learning rate and at ten and a hundred times that. Batch normalisation and the ordinary
rate were chosen on a seed of their own with the first two arms alone, so that both of these train.

Arms differ in the three weights of the discriminator: as they are; torch's ``spectral_norm``, which estimates the
largest singular value by power iteration; ``MatrixNorm`` with three methods. A unit norm would be too small for some
methods, so all arms start from the same function (torch's up to its power iteration): in all arms but the first, a
fixed scale per layer gives the normalised weight the Frobenius norm that the weight has at the start.
``soft_frobenius`` bounds by twice that norm.

Images of a trained generator are compared with digits that nothing was trained on, by the Fréchet distance between
normal distributions fitted to 20 principal components of the training digits. A logistic regression of the training
digits labels them, and a digit is covered if it has at least 2% of the labels. A run has collapsed if fewer than six
digits are covered, or if its distance is above that of a generator whose every image is the mean digit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached, register_parametrization

from benchmarks.common.rows import save_rows
from benchmarks.gan.judge import DIGITS, Images, Judge
from benchmarks.gan.report import Row, plot, print_table
from hyperadapt.nn import MatrixNorm

RATES, SEEDS, STEPS = (2e-4, 2e-3, 2e-2), 5, 1000
PIXELS, NOISE, WIDTH, BATCH = 64, 16, 64, 64
GENERATED, FEWEST, STRIP = 1000, 6, 8
FAST: dict[str, Any] = {"steps": 3, "seeds": 1, "rates": [2e-4, 2e-2]}


def _norm(layer: nn.Linear) -> float:
    return float(layer.weight.detach().norm())


def _matrix_norm(method: str) -> Callable[[nn.Linear], object]:
    def normalize(layer: nn.Linear) -> None:
        options: dict[str, Any] = {"bound": 2 * _norm(layer)} if method == "soft_frobenius" else {}
        register_parametrization(layer, "weight", MatrixNorm(method, **options))

    return normalize


ARMS: dict[str, Callable[[nn.Linear], object]] = {
    "none": lambda layer: None,
    "torch spectral_norm": spectral_norm,
    **{name: _matrix_norm(name) for name in ("spectral", "frobenius", "soft_frobenius")},
}


class Scale(nn.Module):
    """Multiplies a weight by a constant.

    Args:
        factor: The constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        """Multiply.

        Args:
            weight: Any shape.

        Returns:
            Same shape.
        """
        return self.factor * weight


def build(arm: str, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Both networks; those of a seed start from the same functions in all arms.

    Args:
        arm: Name of the arm.
        seed: Of the weights.

    Returns:
        Generator and discriminator.
    """
    torch.manual_seed(seed)
    generator = nn.Sequential(
        *(nn.Linear(NOISE, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        *(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        *(nn.Linear(WIDTH, PIXELS), nn.Tanh()),
    )
    layers = [nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    for layer in layers:
        norm = _norm(layer)
        ARMS[arm](layer)
        if arm != "none":
            register_parametrization(layer, "weight", Scale(norm / _norm(layer)))
    first, second, last = layers
    return generator, nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)


def train(
    generator: nn.Module, discriminator: nn.Module, digits: Tensor, rate: float, steps: int, seed: int
) -> tuple[float, bool]:
    """Train both in turns until the end, or until something is not finite.

    Args:
        generator: The generator.
        discriminator: The discriminator.
        digits: Training images, shape ``(images, pixels)``.
        rate: Learning rate of both.
        steps: Steps of each.
        seed: Of batches and noise.

    Returns:
        The largest finite norm of the discriminator's gradient, and whether all was finite.
    """
    random = torch.Generator().manual_seed(seed)
    ours, theirs = list(generator.parameters()), list(discriminator.parameters())
    optimizers = [torch.optim.Adam(parameters, rate, betas=(0.5, 0.999), fused=True) for parameters in (ours, theirs)]
    largest = 0.0
    for _ in range(steps):
        real = digits[torch.randint(len(digits), (BATCH,), generator=random)]
        with torch.no_grad():
            fake = generator(torch.randn(BATCH, NOISE, generator=random))
        with cached():
            loss = (1 - discriminator(real)).relu().mean() + (1 + discriminator(fake)).relu().mean()
        _set_gradients(theirs, loss)
        norm = float(nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None]))
        if not math.isfinite(norm):
            return largest, False
        largest = max(largest, norm)
        optimizers[1].step()
        _set_gradients(ours, -discriminator(generator(torch.randn(BATCH, NOISE, generator=random))).mean())
        optimizers[0].step()
    return largest, all(bool(parameter.isfinite().all()) for parameter in ours)


def _set_gradients(parameters: Sequence[Tensor], loss: Tensor) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def run_once(arm: str, judge: Judge, rate: float, steps: int, seed: int) -> tuple[Row, Images]:
    """Train and measure once.

    Args:
        arm: Name of the arm.
        judge: The data and measures.
        rate: Learning rate.
        steps: Steps of each network.
        seed: Of the run.

    Returns:
        A row, with None for what is not finite, and the first few images.
    """
    started = time.perf_counter()
    generator, discriminator = build(arm, seed)
    largest, finite = train(generator, discriminator, torch.from_numpy(judge.train), rate, steps, seed)
    generator.eval()
    with torch.no_grad():
        images = generator(torch.randn(GENERATED, NOISE, generator=torch.Generator().manual_seed(seed))).numpy()
    distance, covered = (judge.distance(images), judge.covered(images)) if finite else (None, 0)
    row = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "frechet_distance": distance,
        "covered": covered / DIGITS,
        "collapsed": distance is not None and (distance > judge.mean_image or covered < FEWEST),
        "finite": finite,
        "largest_gradient": largest,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return row, images[:STRIP]


def main() -> None:
    """Run all, print the table, and save rows and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--fast", action="store_true", help="one seed, two rates, three steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/gan"))
    parser.add_argument("--results", type=Path, help="folder of the files; by default --output")
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    torch.set_num_threads(1)
    folder = options.results or options.output
    judge = Judge()
    rows: list[Row] = []
    strips: dict[tuple[str, float], Images] = {}
    for arm, rate, seed in itertools.product(ARMS, options.rates, range(options.seeds)):
        row, images = run_once(arm, judge, rate, options.steps, seed)
        rows.append(row)
        strips.setdefault((arm, rate), images)
    print_table(rows, judge)
    save_rows(folder / "gan.jsonl", rows)
    plot(rows, strips, judge, folder)


if __name__ == "__main__":
    main()
