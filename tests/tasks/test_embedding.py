"""Tests of task names and ids, and of the task embeddings."""

import math
import re

import pytest
import torch
from torch.testing import assert_close

from hyperadapt.tasks.embedding import TaskEmbedding
from hyperadapt.tasks.examples import ExampleEncoder
from hyperadapt.tasks.ids import resolve_task_ids
from tests.support.tolerances import FLOAT32_FORMULA, STANDARD_DEVIATIONS

NAMES = ["trec", "boolq", "bbc"]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("bbc", torch.tensor(2)),
        (["boolq", "trec", "boolq"], torch.tensor([1, 0, 1])),
        (("bbc",), torch.tensor([2])),
        (torch.tensor([2, 0]), torch.tensor([2, 0])),
        (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2])),
        (torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0, 1])),
    ],
)
def test_every_form_of_tasks_gives_int64_ids(tasks: object, expected: torch.Tensor) -> None:
    ids = resolve_task_ids(tasks, NAMES)
    assert ids.dtype == torch.int64
    assert ids.shape == expected.shape
    assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ("imdb", ValueError, "Unknown task 'imdb'. Known tasks: ['trec', 'boolq', 'bbc']."),
        ("", ValueError, "Unknown task ''. Known tasks:"),
        (["trec", "Trec"], ValueError, "Unknown task 'Trec'. Known tasks:"),
        (["trec", 1], TypeError, "must hold names, but holds 1 (int). Pass ids as an integer tensor."),
        ([], ValueError, "tasks is empty; pass one task per row of the batch, or one name for all rows."),
        (3, TypeError, "tasks=3 must be a task name, a list of names (one per row) or an integer tensor"),
        ({"trec"}, TypeError, "tasks={'trec'} must be a task name, a list of names"),
        (torch.tensor([0.0]), TypeError, "dtype torch.float32; task ids must be integers"),
        (torch.tensor([True]), TypeError, "dtype torch.bool; task ids must be integers"),
        (torch.tensor(0), ValueError, "shape (); task ids must have shape (batch,)"),
        (torch.tensor([[0, 1]]), ValueError, "shape (1, 2); task ids must have shape (batch,)"),
        (torch.tensor([], dtype=torch.long), ValueError, "shape (0,); task ids must have shape (batch,)"),
        (torch.tensor([0, 3]), ValueError, "Task id 3 in row 1 is out of range: there are 3 tasks"),
        (torch.tensor([-1, 0]), ValueError, "Task id -1 in row 0 is out of range: there are 3 tasks"),
    ],
)
def test_wrong_tasks_are_refused(tasks: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        resolve_task_ids(tasks, NAMES)


def test_task_embedding_looks_up_one_row_per_id() -> None:
    embedding = TaskEmbedding(3 * ["learned"], [0, 0, 0], 5)
    looked_up = embedding(torch.tensor([2, 0, 2]))
    assert embedding.weight.shape == (3, 5)
    assert torch.equal(looked_up, embedding.weight[[2, 0, 2]])
    looked_up.sum().backward()
    assert torch.equal(embedding.weight.grad, torch.tensor([1.0, 0.0, 2.0])[:, None].expand(3, 5))


def test_task_embeddings_start_as_different_directions() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(TaskEmbedding(20 * ["learned"], 20 * [0], 64).weight.detach(), dim=1)
    cosines = directions @ directions.T - torch.eye(20)
    # The cosine of independent directions has standard deviation √(1/64).
    assert cosines.abs().max() < STANDARD_DEVIATIONS / math.sqrt(64)


def mixed_table() -> TaskEmbedding:
    """Tasks with one, no, three and two descriptions, of size 6, each vector of another direction."""
    torch.manual_seed(0)
    table = TaskEmbedding(["text", "learned", "both", "text"], [1, 0, 3, 2], 5, 6)
    table.set_text_vectors(torch.eye(6))
    return table


def test_text_embeddings_are_projections_of_the_mean_direction() -> None:
    table = mixed_table().eval()
    embeddings = table(torch.tensor([3, 0, 2, 1, 0]))
    columns = table.text_projection.weight.T * math.sqrt(6)
    assert torch.allclose(embeddings[[1, 4]], columns[[0, 0]], rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    mean = (columns[4] + columns[5]) / math.sqrt(2)
    assert torch.allclose(embeddings[0], mean, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    # A task with both starts at its text alone; learned ones have no text.
    assert torch.allclose(embeddings[2], columns[1:4].sum(0) / math.sqrt(3), rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    assert torch.equal(embeddings[3], table.weight[0])
    assert table.weight.shape == (2, 5)
    assert not table.weight[1].any()


def test_the_size_of_a_vector_does_not_count() -> None:
    table, larger = mixed_table().eval(), mixed_table().eval()
    larger.set_text_vectors(torch.eye(6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    ids = torch.arange(4)
    assert torch.allclose(table(ids), larger(ids), rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


def test_training_draws_descriptions_and_leaves_out_the_learned_part() -> None:
    table = mixed_table()
    with torch.no_grad():
        table.weight[1] = 1000.0
    columns = table.text_projection.weight.T * math.sqrt(6)
    drawn: set[tuple[int, bool]] = set()
    for _ in range(200):
        embedding = table(torch.tensor([2]))[0]
        has_learned = bool(embedding.mean() > 500)
        [description] = (
            torch.isclose(embedding - 1000.0 * has_learned, columns, atol=1e-3).all(1).nonzero().flatten().tolist()
        )
        drawn.add((description, has_learned))
    assert drawn == {(description, has_learned) for description in (1, 2, 3) for has_learned in (False, True)}
    # Without gradients there is no chance.
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([2])), table(torch.tensor([2])))


def test_every_parameter_gets_a_gradient_whatever_the_tasks() -> None:
    for ids in ([0], [1], [3, 2]):
        table = mixed_table()
        table(torch.tensor(ids)).sum().backward()
        assert all(parameter.grad is not None for parameter in table.parameters())
    assert TaskEmbedding(["text"], [1], 5, 6).weight is None


def test_vectors_that_were_never_loaded() -> None:
    table = TaskEmbedding(["text", "learned"], [1, 0], 5, 6)
    with pytest.raises(RuntimeError, match="has no vectors of its descriptions"):
        table(torch.tensor([1]))
    table.load_state_dict(
        TaskEmbedding(["text", "learned"], [1, 0], 5, 6).state_dict() | {"text_vectors": torch.ones(1, 6)}
    )
    assert table(torch.tensor([0])).isfinite().all()


def test_direct_text_embeddings_are_the_vectors_themselves() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(3, 6)
    directions = vectors / vectors.square().mean(1, keepdim=True).sqrt()
    table = TaskEmbedding(["text", "both", "learned"], [2, 1, 0], 6, 6, is_direct=True).eval()
    table.set_text_vectors(vectors)
    mean = directions[0] + directions[1]
    expected = torch.stack([mean / mean.square().mean().sqrt(), directions[2], table.weight.detach()[1]])
    assert_close(table(torch.arange(3)), expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    # Each entry has a scale, which is trained.
    table(torch.arange(3)).sum().backward()
    assert table.text_projection.weight.shape == (6,)
    assert table.text_projection.weight.grad.any()


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    table = TaskEmbedding(["both", "text+examples"], [1, 2], 8, 6, ExampleEncoder(4, None, 8)).eval()
    table.set_text_vectors(torch.randn(3, 6))
    raw = torch.randn(5, 8)
    table.example_rows.fill(torch.randn(1, 32, 8), [raw], is_given=True)

    def embeddings() -> tuple[torch.Tensor, ...]:
        return table(torch.tensor([0, 1])), table.project(torch.ones(6)), table.encode(raw)

    expected = embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = embeddings()
    assert_close(actual, expected, rtol=0, atol=0)
