"""Tests of task names and ids, and of the learned task embedding."""

import math
import re

import pytest
import torch

from hyperadapt.tasks import TaskEmbedding, resolve_task_ids
from tests.tolerances import STANDARD_DEVIATIONS

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
    embedding = TaskEmbedding(num_tasks=3, task_embedding_dim=5)
    looked_up = embedding(torch.tensor([2, 0, 2]))
    assert embedding.weight.shape == (3, 5)
    assert torch.equal(looked_up, embedding.weight[[2, 0, 2]])
    looked_up.sum().backward()
    assert torch.equal(embedding.weight.grad, torch.tensor([1.0, 0.0, 2.0])[:, None].expand(3, 5))


def test_task_embeddings_start_as_different_directions() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(TaskEmbedding(20, 64).weight.detach(), dim=1)
    cosines = directions @ directions.T - torch.eye(20)
    # The cosine of independent directions has standard deviation √(1/64).
    assert cosines.abs().max() < STANDARD_DEVIATIONS / math.sqrt(64)
