"""Mixed-task data: one data set from many, which rows make a batch, and the task column on its way to the model."""

import copy
import re
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import default_data_collator

from hyperadapt.trainer import TaskCollator, TaskSampler, concatenate_tasks
from hyperadapt.trainer.batches import RepeatedSampler

TASKS = ["alpha", "beta", "gamma"]


def rows(count: int, **columns: Any) -> Dataset:
    return Dataset.from_dict({"x": list(range(count))} | columns)


def test_concatenated_rows_know_their_task() -> None:
    dataset = concatenate_tasks({"gamma": rows(2), "alpha": rows(3)}, TASKS)
    assert dataset.to_dict() == {"x": [0, 1, 0, 1, 2], "tasks": [2, 2, 0, 0, 0]}
    assert dataset.features["tasks"].dtype == "int64"


def test_columns_may_differ_and_reach_only_one_task_batches() -> None:
    dataset = concatenate_tasks({"alpha": rows(4, a=[1] * 4), "beta": rows(4, b=[2] * 4)}, TASKS)
    collator = TaskCollator(default_data_collator)
    sampler = TaskSampler(dataset["tasks"], 2, max_tasks_per_batch=1)
    keys = [set(batch) for batch in DataLoader(dataset, 2, sampler=sampler, collate_fn=collator)]
    assert Counter(map(frozenset, keys)) == {frozenset({"x", "a", "tasks"}): 2, frozenset({"x", "b", "tasks"}): 2}
    with pytest.raises(
        ValueError, match=r"Column 'a' is missing in rows of the tasks with ids \[1\], but not in other"
    ):
        collator([dataset[0], dataset[4]])


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        ({}, ValueError, "datasets={} has no task"),
        ({"delta": rows(1)}, ValueError, "Unknown task 'delta'. Known tasks: ['alpha', 'beta', 'gamma']"),
        ({"beta": rows(0)}, ValueError, "The data of task 'beta' has no rows"),
        ({"beta": rows(1, tasks=[0])}, ValueError, "The data of task 'beta' already has a column 'tasks'"),
        ({"beta": DatasetDict(train=rows(1))}, TypeError, "is a DatasetDict, but must be a datasets.Dataset"),
        (DatasetDict(train=rows(1)), ValueError, "a DatasetDict with the splits ['train'], none of which is a task"),
        ({"beta": rows(1).with_transform(dict)}, ValueError, "The data of task 'beta' has a transform, which would be"),
        ({"beta": IterableDataset.from_generator(list)}, TypeError, "is a IterableDataset, but must be a datasets.D"),
        ({"beta": [{"x": 1}]}, TypeError, "The data of task 'beta' is a list"),
        (
            {"alpha": rows(1, y=["a"]), "beta": rows(1, y=[0]).cast_column("y", ClassLabel(names=["a"]))},
            ValueError,
            "Column 'y' is ClassLabel(names=['a']",
        ),
    ],
)
def test_bad_data_sets(datasets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        concatenate_tasks(datasets, TASKS)


IDS = [0] * 80 + [2] * 16 + [7] * 4


def drawn(**options: Any) -> list[int]:
    return list(TaskSampler(IDS, **{"batch_size": 8} | options))


def share(indices: list[int]) -> dict[int, int]:
    return dict(Counter(IDS[index] for index in indices))


def test_without_options_an_epoch_is_a_shuffle() -> None:
    first = drawn()
    assert sorted(first) == list(range(100))
    assert first != sorted(first)
    sampler = TaskSampler(IDS, 8)
    assert len(sampler) == 100
    assert list(sampler) == list(sampler) == first
    assert drawn(seed=1) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(100))
    assert second not in (first, drawn(seed=1))


def test_temperature() -> None:
    # √80 : √16 : √4 = 8.94 : 4 : 2, of 100.
    indices = drawn(temperature=2)
    assert share(indices) == {0: 60, 2: 27, 7: 13}
    # All rows of a task come before any comes again.
    times = Counter(indices)
    assert {times[index] for index in range(80)} == {0, 1}
    assert {times[index] for index in range(80, 96)} == {1, 2}
    assert {times[index] for index in range(96, 100)} == {3, 4}
    assert share(drawn(temperature=1e6)) == {0: 34, 2: 33, 7: 33}
    sampler = TaskSampler(IDS, 8, temperature=2)
    unseen = set(range(80))
    for epoch in range(8):
        sampler.set_epoch(epoch)
        unseen -= set(sampler)
    assert not unseen, "some rows of a large task are never drawn"


def test_every_task_has_its_part_in_every_epoch() -> None:
    ids = [0] * 10_000 + [1]
    counts = Counter(ids[index] for index in TaskSampler(ids, 64, max_tasks_per_batch=2))
    assert counts[1] == 32
    assert counts[0] == 10_016


@pytest.mark.parametrize("limit", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2])
def test_limit_of_tasks_in_a_batch(limit: int, processes: int) -> None:
    ids = [task for task in range(5) for _ in range(7 + 5 * task)]
    sampler = TaskSampler(ids, 8, max_tasks_per_batch=limit)
    batches = BatchSampler(sampler, 8, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, rank, even_batches=False)) for rank in range(processes)]
    assert sorted(index for shard in shards for batch in shard for index in batch) == sorted(sampler)
    counts = [len({ids[index] for index in batch}) for shard in shards for batch in shard]
    assert max(counts) == limit
    # Where no row comes again, the units of a task are full batches' parts.
    assert len(sampler) % (8 // limit) == 0
    assert len(ids) <= len(sampler) < len(ids) + 5 * 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.5}, ValueError, "temperature=0.5 must be a finite number of at least 1"),
        ({"temperature": "2"}, TypeError, "temperature='2' must be a number"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"max_tasks_per_batch": 3}, ValueError, "max_tasks_per_batch=3 does not divide batch_size=8"),
        ({"max_tasks_per_batch": 0}, ValueError, "max_tasks_per_batch=0 must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        drawn(**options)


@pytest.mark.parametrize("ids", [[], [[0]], [0.5], ["alpha"]])
def test_bad_task_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match="but must hold the task id, an integer, of each row"):
        TaskSampler(ids, 8)


def test_collator_carries_the_tasks_past_another() -> None:
    seen = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(rows)
        return default_data_collator(rows)

    dataset = concatenate_tasks({"beta": rows(1, y=[None]), "gamma": rows(1, y=[None])}, TASKS)
    for tasks in (dataset, dataset.with_format("torch"), dataset.with_format("numpy")):
        batch = TaskCollator(collate)([tasks[0], tasks[1]])
        assert batch["tasks"].dtype == torch.int64
        assert {name: value.tolist() for name, value in batch.items()} == {"x": [0, 0], "tasks": [1, 2]}
        assert [set(row) for row in seen.pop()] == [{"x"}, {"x"}]


def test_collator_repeats_tasks_by_blocks() -> None:
    dataset = concatenate_tasks({"beta": rows(2), "gamma": rows(1)}, TASKS)

    def pairs(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"x": torch.tensor([row["x"] for row in rows] + [-row["x"] for row in rows])}

    collator = TaskCollator(pairs, blocks=2)
    assert collator([*dataset])["tasks"].tolist() == [1, 1, 2, 1, 1, 2]
    with pytest.raises(ValueError, match="blocks=0 must be at least 1"):
        TaskCollator(pairs, blocks=0)


def test_collator_leaves_rows_as_they_are_made() -> None:
    dataset = concatenate_tasks({"beta": rows(1), "gamma": rows(1)}, TASKS)
    assert TaskCollator(list)([*dataset]) == [{"x": 0, "tasks": 1}, {"x": 0, "tasks": 2}]
    some = [{"x": 0, "y": 1, "z": None, "tasks": 1}, {"x": 0, "y": None, "z": None, "tasks": 1}]
    assert TaskCollator(list, keeps_rows=True)(some) == [{"x": 0, "y": 1, "tasks": 1}, {"x": 0, "y": None, "tasks": 1}]
    with pytest.raises(ValueError, match=r"Column 'y' is missing in rows .* or None in them"):
        TaskCollator(list)(some)


def test_collator_is_asked_for_what_the_other_has() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    collate.columns = ["x"]
    collator = TaskCollator(collate)
    assert copy.copy(collator).columns == ["x"]
    with pytest.raises(AttributeError, match="other"):
        _ = collator.other


def test_repeated_rows() -> None:
    ids = [0] * 4 + [1] * 4
    sampler = TaskSampler(ids, 3, max_tasks_per_batch=1)
    drawn = list(sampler)
    repeated = RepeatedSampler(sampler, 3, copies=2, repeats=2)
    expected = []
    for start in range(0, len(drawn) - 2, 3):
        batch = drawn[start : start + 3]
        once = [row for row in batch for _ in range(2)]
        assert len({ids[row] for row in once}) == 1
        expected += once * 2
    assert list(repeated) == expected
    assert len(repeated) == len(expected)


def test_collator_misses_a_lost_column() -> None:
    with pytest.raises(ValueError, match=r"Row 1 of the batch has no column 'tasks', only \['x'\].*remove_unused_col"):
        TaskCollator(default_data_collator)([{"x": 1, "tasks": 0}, {"x": 1}])
