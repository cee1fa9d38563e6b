"""One data set per task, given to trainers that take one data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Value, concatenate_datasets
from transformers import Trainer

from hyperadapt.trainer.batches import TASK_COLUMN, TaskSampler, check_datasets, concatenate_tasks
from hyperadapt.trainer.rows import is_sequential


class TaskDatasetsMixin(Trainer):
    """Has ``Trainer``, or a subclass of it, take a dict, task name -> data set, and keep the task of each row.

    TRL's trainers look at the first row to tell texts from chats, so each task is prepared by itself.
    """

    task_names: Sequence[str]
    _unprepared: Mapping[str, Dataset] | None = None
    _is_ordered = False
    # Whether the other trainer reads each prompt as what it is, text or chat.
    _mixes_prompts = False

    def _drawn(self, dataset: Dataset, batch_size: int, args: Any) -> TaskSampler:
        raise NotImplementedError

    def _train_data(self, dataset: Any) -> Any:
        """What the other trainer is made with: the data of all tasks, or the first task's until all are prepared."""
        if not isinstance(dataset, Mapping):
            return self._with_tasks("train_dataset", dataset)
        if not hasattr(super(), "_prepare_dataset"):
            concatenate = concatenate_prompts if self._mixes_prompts else concatenate_tasks
            return concatenate(dataset, self.task_names)
        check_datasets(dataset, self.task_names)
        self._unprepared = dict(dataset)
        return next(iter(dataset.values()))

    def _use_unprepared(self) -> None:
        """Put the tasks together where the other trainer has left its data as it was."""
        if self._unprepared is not None:
            self.train_dataset = concatenate_tasks(self._unprepared, self.task_names)
            self._unprepared = None
        if is_sequential(self, self.args) and not self._is_ordered:
            assert isinstance(self.train_dataset, Dataset)
            self.train_dataset = self._ordered(self.train_dataset, self.args)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, *rest: Any) -> Any:
        """Of TRL's trainers, which tokenise here."""
        parts, prepare = self._unprepared, partial(self._prepared_alone, super()._prepare_dataset)  # type: ignore[misc]
        if parts is None or dataset is not next(iter(parts.values())):
            prepared = prepare(dataset, processing_class, args, *rest)
        else:
            self._unprepared = None
            by_task = {name: prepare(part, processing_class, args, *rest) for name, part in parts.items()}
            for name, part in by_task.items():
                if not len(part):
                    raise ValueError(
                        f"None of the {len(parts[name])} rows of task {name!r} is left after tokenising: all are "
                        f"longer than max_length={args.max_length}. Raise max_length, or leave the task out."
                    )
            prepared = concatenate_tasks(_without_texts(by_task), self.task_names)
        if TASK_COLUMN not in prepared.column_names or not is_sequential(self, args):
            return prepared
        if rest[-1] == "train":
            prepared = self._ordered(prepared, args)
        return _paired_within_tasks(prepared, args.per_device_train_batch_size)

    def _ordered(self, dataset: Dataset, args: Any) -> Dataset:
        self._is_ordered = True
        return dataset.select(list(self._drawn(dataset, args.train_batch_size, args)))

    def _prepared_alone(
        self, prepare: Callable[..., Dataset], dataset: Dataset, processing_class: Any, args: Any, *rest: Any
    ) -> Dataset:
        """One data set as the other trainer prepares it alone."""
        if getattr(args, "completion_only_loss", True) is None:
            # TRL's SFTTrainer follows its first row.
            self.completion_only_loss = {"prompt", "completion"} <= set(dataset.column_names)
        return prepare(dataset, processing_class, args, *rest)

    def _with_tasks(self, name: str, dataset: Any) -> Any:
        if isinstance(dataset, Mapping):
            return concatenate_tasks(dataset, self.task_names)
        if dataset is None:
            return None
        if isinstance(dataset, Dataset) and TASK_COLUMN in dataset.column_names:
            kind = getattr(dataset.features[TASK_COLUMN], "dtype", "")
            if not kind.startswith(("int", "uint")):
                raise ValueError(
                    f"The column {TASK_COLUMN!r} of {name} is of type {kind}, but must hold the ids of tasks, integers "
                    "from 0. Pass a dict, task name -> data set, or make the column with concatenate_tasks."
                )
            return dataset
        if isinstance(dataset, Dataset):
            raise ValueError(
                f"{name} has no column {TASK_COLUMN!r}, only {dataset.column_names}. Pass a dict, task name -> data "
                "set, or make the column with concatenate_tasks."
            )
        raise TypeError(
            f"{name} is of type {type(dataset).__name__}, but must be a datasets.Dataset or a dict, task name -> "
            "Dataset. Turn other data into one with Dataset.from_list, or train with transformers' own Trainer."
        )

    def _each_with_tasks(self, dataset: Any) -> Any:
        if not isinstance(dataset, Mapping):
            return self._with_tasks("eval_dataset", dataset)
        if "mean" in dataset:
            raise ValueError(
                "eval_dataset has a task 'mean', whose metrics would be taken for the mean over tasks. Rename the task."
            )
        return {
            name: self._with_tasks("eval_dataset", rows)
            if TASK_COLUMN in getattr(rows, "column_names", ())
            else concatenate_tasks({name: rows}, self.task_names)
            for name, rows in dataset.items()
        }

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if TASK_COLUMN not in columns:
            columns.append(TASK_COLUMN)


def concatenate_prompts(datasets: Mapping[str, Dataset], tasks: Sequence[str]) -> Dataset:
    """As ``concatenate_tasks``, where some tasks have texts in a column and others have chats.

    Such a column is kept as JSON, and read as what it was.
    """
    columns = _texts_and_chats(datasets, or_missing=False)
    if not columns:
        return concatenate_tasks(datasets, tasks)
    check_datasets(datasets, tasks)
    written = {name: dataset.map(partial(_as_json, columns)) for name, dataset in datasets.items()}
    return concatenate_tasks(written, tasks).with_transform(partial(_from_json, columns))


def has_texts_and_chats(datasets: Mapping[str, Dataset]) -> bool:
    """Whether some tasks have texts in a column where others have chats."""
    # Texts may differ, too: pandas makes large strings.
    forms = (
        {isinstance(dataset.features[column], Value) for dataset in datasets.values() if column in dataset.features}
        for column in _texts_and_chats(datasets, or_missing=False)
    )
    return any(len(form) > 1 for form in forms)


def _as_json(columns: Sequence[str], row: Mapping[str, Any]) -> dict[str, str]:
    return {column: json.dumps(row[column]) for column in columns if column in row}


def _from_json(columns: Sequence[str], rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [json.loads(value) if name in columns and value is not None else value for value in values]
        for name, values in rows.items()
    }


def _without_texts(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Data sets without the columns of texts and chats in which they differ, of which tokens have been made."""
    columns = _texts_and_chats(datasets, or_missing=True)
    return {
        name: dataset.remove_columns([column for column in columns if column in dataset.column_names])
        for name, dataset in datasets.items()
    }


def _texts_and_chats(datasets: Mapping[str, Dataset], or_missing: bool) -> list[str]:
    """Columns of texts or chats, of more than one type; or also those that some data set does not have."""
    types: dict[str, list[Any]] = {}
    for dataset in datasets.values():
        for column, feature in dataset.features.items():
            types.setdefault(column, []).append(feature)
    return [
        column
        for column, features in types.items()
        if all(_is_text(feature) for feature in features)
        and (any(feature != features[0] for feature in features) or (or_missing and len(features) < len(datasets)))
    ]


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts, or chats: lists of messages with their roles."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string")
    message = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(message, Mapping) and "role" in message


def _paired_within_tasks(dataset: Dataset, batch_size: int) -> Dataset:
    """TRL's KTO compares prompts with another row's completion: that of a row of the same task, here.

    It is the row's neighbour among those of the task in its batch, in turn, or the task's row before if it is alone.
    """
    if "KL_completion_ids" not in dataset.column_names:
        return dataset
    tasks = dataset[TASK_COLUMN][:]
    sources = list(range(len(tasks)))
    last: dict[int, int] = {task: row for row, task in enumerate(tasks)}
    for start in range(0, len(tasks), batch_size):
        batch: dict[int, list[int]] = {}
        for row in range(start, min(start + batch_size, len(tasks))):
            batch.setdefault(tasks[row], []).append(row)
        for task, rows in batch.items():
            for row, source in zip(rows, [rows[-1] if len(rows) > 1 else last[task], *rows[:-1]], strict=True):
                sources[row] = source
            last[task] = rows[-1]
    others = dataset.select(sources).select_columns("completion_ids")
    kept = dataset.remove_columns("KL_completion_ids")
    return concatenate_datasets([kept, others.rename_column("completion_ids", "KL_completion_ids")], axis=1)


def majority_of(rows: Any) -> float | None:
    """What always giving the most frequent label of rows would reach; None where they have no class each."""
    column = next((name for name in ("labels", "label") if name in getattr(rows, "column_names", ())), None)
    labels = [] if column is None else list(rows.with_format(None)[column])
    if not labels or not all(isinstance(label, int | str) for label in labels):
        return None
    [(_, count)] = Counter(labels).most_common(1)
    return count / len(labels)
