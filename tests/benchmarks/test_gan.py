"""The GAN study runs, its arms start alike and are bound as they should be, and its measures are right."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from benchmarks.common.rows import read_rows
from benchmarks.gan import __main__ as gan
from benchmarks.gan.judge import Judge, frechet_distance


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_fast_form_writes_rows_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gan", "--fast", "--output", str(tmp_path)])
    gan.main()
    rows = read_rows(tmp_path / "gan.jsonl")
    assert [(row["arm"], row["rate"], row["seed"]) for row in rows] == [
        (arm, rate, 0) for arm in gan.ARMS for rate in gan.FAST["rates"]
    ]
    lines = capsys.readouterr().out.splitlines()
    for row, line in zip(rows, lines[3:-1], strict=True):
        assert row.keys() >= {"torch", "commit", "steps", "frechet_distance", "seconds"}
        assert row["finite"]
        assert line.startswith(row["arm"])
        assert line.split()[-1] == f"{row['largest_gradient']:.3g}"
    assert {path.name for path in tmp_path.iterdir()} == {"gan.jsonl", "gan.svg"}


def test_a_run_is_the_same_again(judge: Judge) -> None:
    [(row, images), (again, images_again)] = [gan.run_once("spectral", judge, 1e-2, 3, seed=1) for _ in range(2)]
    assert row | {"seconds": 0} == again | {"seconds": 0}
    assert images.tobytes() == images_again.tobytes()


def test_all_arms_start_from_the_same_functions(judge: Judge) -> None:
    digits = torch.from_numpy(judge.train[:50])
    for seed in (0, 1):
        expected = gan.build("none", seed)[1](digits).detach()
        for arm in gan.ARMS:
            # Power iteration has not converged when torch's arm starts.
            tolerance = 1e-2 if arm == "torch spectral_norm" else 1e-6
            torch.testing.assert_close(gan.build(arm, seed)[1](digits).detach(), expected, rtol=0, atol=tolerance)


def test_normalised_weights_keep_their_bounds_after_high_rates(judge: Judge) -> None:
    digits = torch.from_numpy(judge.train)
    for arm in ("spectral", "frobenius", "soft_frobenius"):
        generator, discriminator = gan.build(arm, seed=0)
        start = [discriminator[place].weight.detach() for place in (0, 2, 4)]
        gan.train(generator, discriminator, digits, rate=0.5, steps=5, seed=0)
        end = [discriminator[place].weight.detach() for place in (0, 2, 4)]
        for before, after in zip(start, end, strict=True):
            assert not torch.allclose(before, after, rtol=0.1)
            if arm == "spectral":
                largest = [float(torch.linalg.matrix_norm(weight, 2)) for weight in (before, after)]
                assert largest[1] == pytest.approx(largest[0], rel=1e-4)
            elif arm == "frobenius":
                assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-4)
            else:
                # The start is at 1 / √(1 + 1/4) of its norm before the scale, so the bound of 2 is at √5.
                assert float(before.norm()) < float(after.norm()) < math.sqrt(5) * float(before.norm())


def test_training_stops_where_something_is_not_finite(judge: Judge) -> None:
    digits = torch.full((100, gan.PIXELS), math.nan)
    assert gan.train(*gan.build("none", seed=0), digits, rate=1e-3, steps=3, seed=0) == (0.0, False)


def test_frechet_distance_is_that_of_the_formula() -> None:
    random = np.random.default_rng(0)
    one, other = random.normal(size=(60, 4)) @ random.normal(size=(4, 4)), random.normal(1, 2, size=(50, 4))
    covariances = [np.cov(sample.T) for sample in (one, other)]
    root = sqrtm(covariances[0] @ covariances[1])
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root).real
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(one, one + 3) == pytest.approx(4 * 9)


def test_judge_knows_digits_from_one_digit_and_from_their_mean(judge: Judge) -> None:
    assert judge.covered(judge.train) == 10
    assert judge.covered(np.repeat(judge.train[:1], 100, 0)) == 1
    assert 0 < judge.floor < 0.02 * judge.mean_image
    # All that the mean digit lacks is the variance, up to the difference of the means.
    assert judge.mean_image == pytest.approx(np.trace(np.cov(judge._held_out.T)), rel=0.02)
