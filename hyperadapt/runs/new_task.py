"""A new task for a trained run, from examples or from a description."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import dataset_columns, read_columns
from hyperadapt.recipes.recipe import TaskRecipe
from hyperadapt.recipes.rows import TaskRows, checked_rows, data_columns, sampled
from hyperadapt.recipes.schema import check_task_name, checked_file, checked_labels
from hyperadapt.recipes.tokens import collator
from hyperadapt.runs.evaluation import tokenize
from hyperadapt.runs.run import Run
from hyperadapt.tuner.active import active_network, find_tuner

# Of more, that many are drawn: all of them are run through the model from up to 66 starting points.
MAX_EXAMPLES = 256


def add_task(  # noqa: DOC502
    run: Run,
    name: str,
    *,
    description: str | Sequence[str] | None = None,
    examples: str | os.PathLike[str] | Dataset | None = None,
    test: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Add a task to a trained adapter in memory; the other tasks keep every bit.

    Args:
        run: The run, whose model and recipe are changed; write it with ``save_run``.
        name: Name of the task.
        description: What the task is, one text or several. Alone it needs no training.
        examples: 8 to 64 labelled rows, a file or a data set with the columns of a recipe's defaults.
        test: File with rows to evaluate on later.
        labels: Names of the task's labels, among those of the classifier; None takes them from the examples.

    Raises:
        ValueError: If the name is taken, nothing is given to go by, the data are wrong, or the classifier does not know
            a label.
    """
    check_task_name(name)
    files = {"train": None if isinstance(examples, Dataset) else examples, "test": test}
    task = TaskRecipe(
        description=description if description is None or isinstance(description, str) else tuple(description),
        labels=checked_labels("labels", list(labels)) if labels else None,
        **{
            split: checked_file(Path(), True, split, os.fspath(path))
            for split, path in files.items()
            if path is not None
        },
    )
    task_type = run.recipe.task_type
    rows = None if examples is None else _example_rows(task, name, task_type, examples)
    if task_type == "SEQ_CLS":
        task = replace(task, labels=task.labels or (rows.names if rows else None))
        _check_known_labels(run, name, task)
    encoded = None if rows is None else tokenize(rows, run.recipe, run.tokenizer)
    collate = collator(run.tokenizer, task_type)
    find_tuner(run.model).add_task(name, description=description, examples=encoded, data_collator=collate)
    config = active_network(run.model)[1].config
    adapter = {**run.recipe.adapter, "task_embedding": config.task_embedding}
    run.recipe = replace(run.recipe, adapter=adapter, tasks={**run.recipe.tasks, name: task})


def _example_rows(task: TaskRecipe, name: str, task_type: str, examples: Any) -> TaskRows:
    columns = data_columns(task, task_type)
    if isinstance(examples, Dataset):
        found = dataset_columns(examples, f"Task {name!r}, examples", columns)
    else:
        found = read_columns(task, name, "train", columns)
    return sampled(checked_rows(found, task, task_type), MAX_EXAMPLES)


def _check_known_labels(run: Run, name: str, task: TaskRecipe) -> None:
    known = run.recipe.labels
    if task.labels is None:
        raise ValueError(
            f"Task {name!r} needs labels=, the names that its rows may get. The classifier knows {shown(known)}."
        )
    unknown = [label for label in task.labels if label not in known]
    if unknown:
        raise ValueError(
            f"Task {name!r} has the labels {shown(unknown)}, for which the classifier has no output: those of a "
            f"trained adapter are fixed. It knows {shown(known)}. Rename the labels, or train anew with this task."
        )
