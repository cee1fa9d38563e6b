"""Tests of what whitens the vectors of descriptions."""

import pytest
import torch
from torch.nn.functional import rms_norm

from hyperadapt.tasks.whitening import MAX_DIRECTIONS, damped, num_directions, shared_directions
from tests.support.tolerances import FLOAT32_FORMULA


def drawn(count: int, dim: int) -> torch.Tensor:
    """Vectors with much in common, and more variance in some directions than in others."""
    torch.manual_seed(0)
    return torch.randn(count, dim) * torch.linspace(0.1, 3.0, dim) + 2.0


@pytest.mark.parametrize(("count", "dim"), [(2, 6), (5, 6), (40, 6), (7, 7)])
def test_the_formula(count: int, dim: int) -> None:
    vectors, new = drawn(count, dim), torch.randn(3, dim)
    rows = rms_norm(vectors.double(), (dim,))
    variance = (rows - rows.mean(0)).square().sum() / count / min(count - 1, dim)
    values, directions = torch.linalg.eigh(rows.T @ rows / count + variance * torch.eye(dim))
    expected = new.double() @ (directions * (variance / values).sqrt()) @ directions.T
    assert shared_directions(vectors).shape == (dim, dim)
    found = damped(new, shared_directions(vectors)).double()
    torch.testing.assert_close(found, expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


def test_the_size_of_vectors_does_not_count() -> None:
    vectors = drawn(5, 6)
    larger = vectors * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[:, None]
    directions = shared_directions(vectors)
    torch.testing.assert_close(
        shared_directions(larger).T @ shared_directions(larger),
        directions.T @ directions,
        rtol=FLOAT32_FORMULA,
        atol=FLOAT32_FORMULA,
    )


def test_variances_are_closer_to_each_other() -> None:
    vectors = drawn(2000, 6)
    rows = rms_norm(vectors, (6,))
    before, after = (
        torch.linalg.eigvalsh(torch.cov(one.T)) for one in (rows, damped(rows, shared_directions(vectors)))
    )
    assert after.max() / after.median() < before.max() / before.median() / 1.5
    # Those that hardly differ stay the smallest.
    assert after.min() < after.median() / 10


def test_one_vector_and_equal_ones_damp_nothing() -> None:
    one = drawn(1, 6)
    for vectors in (one, one.repeat(3, 1), one.repeat(3, 1) * (1 + 1e-6 * torch.randn(3, 6))):
        assert not shared_directions(vectors).any()


def test_large_vectors_have_the_directions_that_count_most() -> None:
    dim = MAX_DIRECTIONS + 100
    vectors = drawn(2 * dim, dim)
    directions = shared_directions(vectors)
    assert directions.shape == (num_directions(dim), dim) == (MAX_DIRECTIONS, dim)
    # The squared lengths are the shares that are taken away, the largest first.
    lengths = directions.square().sum(1)
    assert (lengths[:-1] >= lengths[1:] - FLOAT32_FORMULA).all()
    assert 0 < lengths.min() <= lengths.max() < 1
