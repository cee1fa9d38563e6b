"""Training of a new task: with rows of the old ones, so that those are not forgotten, or of its own factors alone."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import dataset_columns, read_columns
from hyperadapt.recipes.recipe import TaskRecipe
from hyperadapt.recipes.rows import TaskRows, checked_rows, data_columns, read_rows, sampled
from hyperadapt.recipes.schema import checked_file
from hyperadapt.runs.evaluation import tokenize
from hyperadapt.runs.run import Run
from hyperadapt.runs.training import Report, make_trainer
from hyperadapt.tuner.active import active_network, find_tuner

Source: TypeAlias = str | os.PathLike[str] | Dataset
# Of each old task, how many rows at most are trained on again, and how many are answered before and after.
REPLAYED_ROWS, MEASURED_ROWS = 256, 64
# What a recipe says on how long to train, and on evaluating and saving meanwhile, is for its own training.
_OF_THE_FIRST = re.compile(
    "num_train_epochs|max_steps|warmup_.*|eval_.*|save_.*|logging_.*|load_best_.*|metric_for_.*|greater_is_better"
)


@dataclass(frozen=True)
class Replay:
    """Tokenised rows of old tasks: to train on again; and to measure what is lost, with where those come from."""

    train: Mapping[str, Dataset]
    measured: Mapping[str, Dataset]
    splits: Mapping[str, str]


def read_source(task: TaskRecipe, name: str, task_type: str, source: Source, what: str) -> TaskRows:
    """The rows of a data set or a file that a caller gave for a task; errors call it `what`."""
    columns, instead = data_columns(task, task_type)
    if isinstance(source, Dataset):
        found = dataset_columns(source, f"Task {name!r}, {what}", columns, instead)
    else:
        path = checked_file(Path(), True, what, os.fspath(source))
        found = read_columns(replace(task, dataset=None, train=path), name, "train", columns, instead)
    return checked_rows(found, task, task_type)


def read_replay(run: Run, given: Mapping[str, Source]) -> Replay:
    """Rows of the old tasks: those that are given, else of the files that the run's recipe names.

    What is lost is measured on the first of the test, validation and training split that a task has.
    """
    tasks = run.recipe.tasks
    unknown = [name for name in given if name not in tasks]
    if unknown:
        raise ValueError(
            f"replay names {shown(unknown)}, which are no old tasks of the adapter. Its tasks: {shown(list(tasks))}."
        )
    train, measured, splits = {}, {}, {}
    for name, task in tasks.items():
        if name in given:
            rows = read_source(task, name, run.recipe.task_type, given[name], f"replay[{name!r}]")
            train[name], measured[name], splits[name] = rows, rows, "replay"
            continue
        split = next((split for split in ("test", "validation", "train") if getattr(task, split)), None)
        try:
            if task.train is not None:
                train[name] = read_rows(run.recipe, name, "train")
            if split is not None:
                measured[name], splits[name] = read_rows(run.recipe, name, split), split
        except ValueError as error:
            raise ValueError(
                f"{error} This is an old task, whose rows are trained on again so that it is not forgotten. Give its "
                f"rows with replay (--replay {name}=FILE)."
            ) from error
    if not train:
        raise ValueError(
            f"None of the old tasks {shown(list(tasks))} has rows to train on again, so they would be forgotten. Give "
            "rows with replay (--replay TASK=FILE), or do not train."
        )
    return Replay(_drawn(run, train, REPLAYED_ROWS), _drawn(run, measured, MEASURED_ROWS), splits)


def train_with_replay(
    run: Run,
    name: str,
    rows: Dataset,
    replay: Mapping[str, Dataset],
    *,
    steps: int,
    learning_rate: float | None,
    report: Report | None,
) -> dict[str, Any]:
    """Train what is trainable, half on a task's rows and half on those of old ones, if any; the facts to record."""
    training = {key: value for key, value in run.recipe.training.items() if not _OF_THE_FIRST.fullmatch(key)}
    training |= {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
    if learning_rate is not None:
        training["learning_rate"] = learning_rate
    # Shares are those of the rows.
    recipe = replace(run.recipe, training=training, trainer={**run.recipe.trainer, "temperature": 1.0})
    with tempfile.TemporaryDirectory() as folder:
        arguments = recipe.training_arguments(folder)
        data = {"train": _halves(name, rows, replay)}
        trainer = make_trainer(run.model, run.tokenizer, recipe, arguments, data, report)
        trainer.train()
    run.model.eval()
    return {
        "steps": trainer.state.global_step,
        "learning_rate": arguments.learning_rate,
        "rows": len(rows),
        "replayed_rows": sum(map(len, replay.values())),
    }


@contextmanager
def trainable(model: PeftModel, task: str | None = None) -> Iterator[None]:
    """Let the active adapter be trained, or a task's own factors; on an error its numbers are what they were."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    _, network = active_network(model)
    tuner = find_tuner(model)
    trained_task = tuner.trained_task
    tuner.set_trained_task(task)
    state = [*(one for one in model.parameters() if one.requires_grad), *network.buffers()]
    copies = [tensor.detach().clone() for tensor in state]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, copy in zip(state, copies, strict=True):
                tensor.copy_(copy)
        raise
    finally:
        model.eval()
        tuner.set_trained_task(trained_task)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


def _drawn(run: Run, rows: Mapping[str, TaskRows], most: int) -> dict[str, Dataset]:
    return {name: tokenize(sampled(one, most), run.recipe, run.tokenizer) for name, one in rows.items()}


def _halves(name: str, rows: Dataset, replay: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The rows by task, repeated so that a task has as many as the old ones together."""
    replayed = sum(map(len, replay.values()))
    size = max(len(rows), replayed)
    old = {task: _repeated(one, -(-size * len(one) // replayed)) for task, one in replay.items()}
    return {**old, name: _repeated(rows, size)}


def _repeated(rows: Dataset, count: int) -> Dataset:
    # Not by numbers of rows, which would have to be copied out in the end, under a bar.
    times, rest = divmod(count, len(rows))
    return concatenate_datasets([rows] * times + [rows.select(range(rest))])
