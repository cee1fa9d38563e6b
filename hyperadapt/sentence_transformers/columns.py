"""The task of each column of the data that embedding models are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from hyperadapt.config.checks import shown
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.trainer.batches import TASK_COLUMN

# Those that sentence-transformers reads labels from.
LABELS = ("label", "labels", "score", "scores")
Mapped = Mapping[str, Any]


class TaskTextCollator(SentenceTransformerDataCollator):
    """Makes batches as sentence-transformers does; rows with a column ``tasks`` keep their own."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, with the task of each row for each column that the router mapping does not name."""
        tasks = [row[TASK_COLUMN] for row in features if TASK_COLUMN in row]
        rows = [{name: value for name, value in row.items() if name != TASK_COLUMN} for row in features]
        batch: dict[str, Any] = super().__call__(rows)
        for column in rows[0] if tasks else ():
            if f"{column}_input_ids" in batch and f"{column}_task" not in batch:
                batch[f"{column}_{TASK_COLUMN}"] = tasks if isinstance(tasks[0], str) else torch.tensor(tasks)
        return batch


def with_row_tasks(dataset: Any, names: Sequence[str]) -> Any:
    """A data set whose column ``tasks``, if there is one, holds ids of known tasks."""
    if not isinstance(dataset, Dataset) or TASK_COLUMN not in dataset.column_names:
        return dataset
    tasks = dataset.with_format(None)[TASK_COLUMN][:]
    ids = resolve_task_ids(tasks if isinstance(tasks[0], str) else torch.as_tensor(tasks), names)
    return dataset.remove_columns(TASK_COLUMN).add_column(TASK_COLUMN, ids.numpy())


def mapping_of(data: Any, given: Mapped | None, names: Sequence[str]) -> dict[str, Any]:
    """Data set name -> column -> task, or column -> task of one data set: as given, or else the data set's name."""
    given = given or {}
    if not isinstance(data, Mapping):
        return _of_columns("the data set", data, given, None, names)
    is_nested = any(isinstance(entry, Mapping) for entry in given.values())
    return {
        name: _of_columns(f"data set {name!r}", dataset, given.get(name, {}) if is_nested else given, name, names)
        for name, dataset in data.items()
    }


def _of_columns(what: str, dataset: Any, given: Mapped, name: str | None, names: Sequence[str]) -> dict[str, str]:
    # A stream may not know its columns, which sentence-transformers then asks for.
    columns = [column for column in dataset.column_names or () if column not in LABELS]
    unknown = {column: task for column, task in given.items() if task not in names}
    if unknown:
        raise ValueError(
            f"router_mapping gives columns of {what} the tasks {shown(unknown)}, but the known ones are "
            f"{shown(list(names))}."
        )
    fallback = name if name in names else names[0] if len(names) == 1 else None
    found = {column: given.get(column, fallback) for column in columns if column != TASK_COLUMN}
    if TASK_COLUMN in columns:
        # Its rows know theirs.
        return {column: given[column] for column in found if column in given}
    lost = [column for column, task in found.items() if task is None]
    if lost:
        of_column = {lost[0]: names[0]}
        example = of_column if name is None else {name: of_column}
        raise ValueError(
            f"The column {lost[0]!r} of {what} has no task. Name it with router_mapping={example} of the training "
            f"arguments, call the data set by the name of a task, or give it a column {TASK_COLUMN!r} with the task of "
            f"each row; the tasks are {shown(list(names))}."
        )
    return {column: task for column, task in found.items() if task is not None}
