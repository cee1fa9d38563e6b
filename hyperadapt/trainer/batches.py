"""Mixed-task batches from one data set per task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import Sampler

from hyperadapt.config.checks import check_integer, check_number, shown

TASK_COLUMN = "tasks"


def concatenate_tasks(datasets: Mapping[str, Dataset], tasks: Sequence[str]) -> Dataset:  # noqa: DOC503
    """Put one data set per task into one, with the column ``tasks`` of task ids that the model reads.

    A column that some tasks lack is None in their rows; ``TaskCollator`` leaves such columns out of a batch.

    Args:
        datasets: Task name -> its data.
        tasks: Names of all tasks of the adapter (``HyperAdapterConfig.tasks``); a task's id is its place here.

    Returns:
        The rows of all tasks, one task after another. Shuffle them, or draw batches with ``TaskSampler``.

    Raises:
        TypeError: If one is not a `datasets.Dataset`.
        ValueError: If there is no data set, a task is unknown, a data set is empty, has a transform or already has a
            column ``tasks``, or two tasks disagree on the type of a column.
    """
    check_datasets(datasets, tasks)
    types: dict[str, tuple[str, Any]] = {}
    for name, dataset in datasets.items():
        for column, feature in dataset.features.items():
            other, expected = types.setdefault(column, (name, feature))
            if feature != expected:
                raise ValueError(
                    f"Column {column!r} is {feature} in task {name!r} but {expected} in task {other!r}. Convert one of "
                    f"the two with cast_column, or drop it with remove_columns({column!r})."
                )
    with_tasks = [
        dataset.add_column(TASK_COLUMN, np.full(len(dataset), list(tasks).index(name)))
        for name, dataset in datasets.items()
    ]
    return concatenate_datasets(with_tasks)


class TaskSampler(Sampler[int]):
    """Draws the rows of an epoch so that every `batch_size` in a row make a batch of the wished tasks.

    An epoch has about as many rows as the data set. A task's share of them is p ∝ n^(1/T) for its n rows and the
    temperature T, exact to one unit and at least one unit, where a unit is the rows that a batch draws from one task at
    once (1 without a limit on tasks). Within its share a task's rows come in random order, all of them before any
    comes again. With T = 1 and no limit that is a plain shuffle.

    For ``DataLoader(dataset, batch_size, sampler=TaskSampler(...))``, which Accelerate and Trainer deal out to
    processes batch by batch: every process makes the same order. It depends on `seed` and the epoch alone, so a run can
    be resumed in the middle of an epoch by skipping the batches that were seen. Like torch's ``DistributedSampler`` it
    needs ``set_epoch`` before each epoch; Accelerate's data loaders call it, except after ``skip_first_batches`` in
    several processes.

    Args:
        task_ids: Task of each row, shape ``(rows,)``: the column ``tasks`` of the data set.
        batch_size: Rows of a batch, on one device.
        temperature: T above, dimensionless, at least 1: 1 samples in proportion to size, 100 nearly all tasks alike.
        max_tasks_per_batch: Limit on the distinct tasks in a batch, a divisor of `batch_size`; 1 makes one-task
            batches, None sets no limit.
        seed: Seed of all epochs.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no row, or an argument is out of range.
    """

    def __init__(  # noqa: DOC503
        self,
        task_ids: Sequence[int],
        batch_size: int,
        *,
        temperature: float = 1.0,
        max_tasks_per_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        check_integer("batch_size", batch_size)
        check_number("temperature", temperature, "a finite number of at least 1", lambda value: value >= 1)
        if max_tasks_per_batch is not None:
            check_integer("max_tasks_per_batch", max_tasks_per_batch)
            if batch_size % max_tasks_per_batch:
                raise ValueError(
                    f"max_tasks_per_batch={max_tasks_per_batch} does not divide batch_size={batch_size}: the tasks of "
                    "a batch get equally many rows. Change one of the two."
                )
        ids = np.asarray(task_ids)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ValueError(
                f"task_ids has shape {ids.shape} and dtype {ids.dtype}, but must hold the task id, an integer, of each "
                "row of the data set. Make that column with concatenate_tasks."
            )
        self._rows = [np.flatnonzero(ids == task) for task in np.unique(ids)]
        self._unit = 1 if max_tasks_per_batch is None else batch_size // max_tasks_per_batch
        self._units = _shares([len(rows) for rows in self._rows], self._unit, temperature)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._unit * int(self._units.sum())

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, self._epoch])
        parts = []
        for rows, units in zip(self._rows, self._units, strict=True):
            count = int(units) * self._unit
            passes = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
            parts.append(np.concatenate(passes)[:count].reshape(-1, self._unit))
        yield from generator.permutation(np.concatenate(parts)).reshape(-1).tolist()


class RepeatedSampler(Sampler[int]):
    """Rows in batches that each come `repeats` times, with `copies` of each row in a row.

    For TRL's trainers that generate: they compare completions of one prompt, and use them for several steps.
    """

    def __init__(self, sampler: TaskSampler, batch_size: int, copies: int, repeats: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.copies = copies
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size * self.batch_size * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        rows = list(self.sampler)
        for start in range(0, len(rows) - self.batch_size + 1, self.batch_size):
            batch = rows[start : start + self.batch_size]
            yield from [row for _ in range(self.repeats) for row in batch for _ in range(self.copies)]


class TaskCollator:
    """Collates rows with another collator and carries their tasks past it.

    Columns that are None in all rows of a batch (see ``concatenate_tasks``) are left out.

    Args:
        collator: Makes a batch, a dict, of rows without the column ``tasks``; or leaves the rows as they are.
        blocks: How many blocks of all rows, one after another, the collator's batch consists of: 2 for TRL's preference
            data, [all chosen; all rejected].
        keeps_rows: Whether the collator leaves the rows as they are, so that some may have None where others do not.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], Any], *, blocks: int = 1, keeps_rows: bool = False
    ) -> None:
        check_integer("blocks", blocks)
        self.collator = collator
        self.blocks = blocks
        self.keeps_rows = keeps_rows

    def __getattr__(self, name: str) -> Any:
        """What trainers look up on their own collators."""
        if name == "collator":
            # Not there yet, while it is copied.
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Make a batch.

        Args:
            rows: The rows, each with an integer ``tasks``.

        Returns:
            The other collator's batch, and ``tasks``: int64 task ids, shape ``(batch,)``, or ``(blocks * batch,)``. If
            the collator made no batch of the rows, the rows.

        Raises:
            ValueError: If a row has no task, or some rows lack a column that others have.
        """
        lost = [index for index, row in enumerate(rows) if row.get(TASK_COLUMN) is None]
        if lost:
            raise ValueError(
                f"Row {lost[0]} of the batch has no column {TASK_COLUMN!r}, only {sorted(rows[lost[0]])}. Make it with "
                "concatenate_tasks. If the data set has it, it was dropped on the way: give Trainer "
                "remove_unused_columns=False or use HyperAdapterTrainer, and do not pack rows into one."
            )
        columns = {name for row in rows for name, value in row.items() if value is not None} - {TASK_COLUMN}
        for name in [] if self.keeps_rows else sorted(columns):
            lacking = sorted({int(row[TASK_COLUMN]) for row in rows if row.get(name) is None})
            if lacking:
                raise ValueError(
                    f"Column {name!r} is missing in rows of the tasks with ids {lacking}, but not in other rows of the "
                    "batch, or None in them. Give all rows of a task the same columns, and all tasks, or make one-task "
                    "batches with max_tasks_per_batch=1."
                )
        batch = self.collator([{name: value for name, value in row.items() if name in columns} for row in rows])
        tasks = [int(row[TASK_COLUMN]) for row in rows]
        if isinstance(batch, list):
            return [{**row, TASK_COLUMN: task} for row, task in zip(batch, tasks, strict=True)]
        return {**batch, TASK_COLUMN: torch.tensor(tasks * self.blocks)}


def check_datasets(datasets: Mapping[str, Dataset], tasks: Sequence[str]) -> None:
    """Refuse what is no data of tasks that are known."""
    if not datasets:
        raise ValueError(f"datasets={datasets!r} has no task. Give the data of at least one of {shown(list(tasks))}.")
    if isinstance(datasets, DatasetDict) and not any(name in tasks for name in datasets):
        raise ValueError(
            f"The data is a DatasetDict with the splits {shown(list(datasets))}, none of which is a task. Choose one "
            f"split for each task, as in {{task: dataset[{next(iter(datasets))!r}]}}."
        )
    for name, dataset in datasets.items():
        _check_dataset(name, dataset, tasks)


def _check_dataset(name: str, dataset: object, tasks: Sequence[str]) -> None:
    if name not in tasks:
        raise ValueError(
            f"Unknown task {name!r}. Known tasks: {shown(list(tasks))}; add it to HyperAdapterConfig.tasks."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The data of task {name!r} is a {type(dataset).__name__}, but must be a datasets.Dataset: choose one "
            "split of a DatasetDict, load without streaming, and turn other data into one with Dataset.from_list."
        )
    if not len(dataset):
        raise ValueError(f"The data of task {name!r} has no rows. Leave the task out, or give it rows.")
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The data of task {name!r} has a transform, which would be lost when tasks are put together. Make its "
            "columns with map; or put the data together with concatenate_tasks first, and then use with_transform, "
            f"with a function that keeps the column {TASK_COLUMN!r}, and remove_unused_columns=False."
        )
    if TASK_COLUMN in dataset.column_names:
        raise ValueError(
            f"The data of task {name!r} already has a column {TASK_COLUMN!r}, where the task ids go. Rename it with "
            "rename_column, or remove it."
        )


def _shares(sizes: list[int], unit: int, temperature: float) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Units of each task in an epoch: by largest remainders, and at least 1."""
    total = max(len(sizes), -(-sum(sizes) // unit))
    weights = np.asarray(sizes, dtype=np.float64) ** (1 / temperature)
    exact = total * weights / weights.sum()
    shares: np.ndarray[Any, np.dtype[np.int64]] = np.floor(exact).astype(np.int64)
    rest = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[rest] += 1
    shares[shares == 0] = 1
    return shares
