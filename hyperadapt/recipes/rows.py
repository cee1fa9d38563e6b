"""The rows of a recipe's tasks: texts and labels, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import Columns, read_columns
from hyperadapt.recipes.recipe import Recipe, TaskRecipe
from hyperadapt.trainer.chats import is_chat, split_chat


@dataclass(frozen=True)
class TaskRows:
    """The rows of one split of a task, checked."""

    # The task and the file, for messages.
    place: str
    # Of each row one or two texts to classify; or prompt and completion, which may be lists of messages.
    texts: Sequence[tuple[Any, ...]]
    # Of each row the name of its label, and the labels that the task has, in order; both empty for a language model.
    labels: Sequence[str]
    names: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> TaskRows:
        """Some of the rows, by their numbers from 0, of a task with the same labels."""
        labels = [self.labels[row] for row in rows] if self.labels else []
        return TaskRows(self.place, [self.texts[row] for row in rows], labels, self.names)


def read_rows(recipe: Recipe, name: str, split: str) -> TaskRows:
    """One split of a task, at most ``max_rows`` of it; errors name task, file, row and column."""
    task = recipe.tasks[name]
    columns = read_columns(task, name, split, *data_columns(task, recipe.task_type))
    return sampled(checked_rows(columns, task, recipe.task_type), recipe.max_rows.get(split))


def sampled(rows: TaskRows, max_rows: int | None) -> TaskRows:
    """Rows at random, in their order, the same ones every time; files are often sorted by label."""
    if max_rows is None or max_rows >= len(rows.texts):
        return rows
    chosen = np.random.default_rng(0).choice(len(rows.texts), max_rows, replace=False)
    return rows.select(sorted(chosen.tolist()))


def data_columns(task: TaskRecipe, task_type: str) -> tuple[list[str], list[str]]:
    """The columns that a task's data needs, the label's last; and what may stand in place of them, or nothing."""
    if task_type == "CAUSAL_LM":
        return [task.prompt, task.completion], [task.messages]
    return [column for column in (task.text, task.text_pair, task.label) if column is not None], []


def checked_rows(columns: Columns, task: TaskRecipe, task_type: str) -> TaskRows:
    """Texts and labels; errors name task, file, row and column."""
    (*text_columns, last), _ = data_columns(task, task_type)
    if task_type == "CAUSAL_LM" and last not in columns.values:
        chats = enumerate(columns.values[task.messages], 1)
        return TaskRows(columns.place, [split_chat(f"{columns.place}, row {row}", chat) for row, chat in chats], [], ())
    if task_type == "CAUSAL_LM":
        dialogues = list(zip(columns.values[task.prompt], columns.values[last], strict=True))
        for row, (prompt, completion) in enumerate(dialogues, 1):
            _check_dialogue(f"{columns.place}, row {row}", prompt, completion)
        return TaskRows(columns.place, dialogues, [], ())
    for column in text_columns:
        for row, text in enumerate(columns.values[column], 1):
            if not isinstance(text, str):
                raise ValueError(
                    f"{columns.place}, row {row} has {shown(text)} ({type(text).__name__}) in column {column!r}, but "
                    "needs a text."
                )
    texts = list(zip(*(columns.values[column] for column in text_columns), strict=True))
    labels = _label_names(columns, last, task.labels)
    names = task.labels or tuple(columns.names.get(last, ())) or tuple(dict.fromkeys(labels))
    return TaskRows(columns.place, texts, labels, names)


def _label_names(columns: Columns, column: str, declared: Sequence[str] | None) -> list[str]:
    values = columns.values[column]
    if columns.is_text and not declared and all(re.fullmatch(r"-?\d+", value) for value in values):
        raise ValueError(f"{columns.place} has integers in column {column!r}. {_NAMELESS}")
    names = declared or columns.names.get(column)
    labels = []
    for row, value in enumerate(values, 1):
        place = f"{columns.place}, row {row}"
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{place} has an empty label in column {column!r}. Fill it in, or drop the row.")
        if columns.is_text and value not in (names or [value]) and re.fullmatch(r"-?\d+", value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if names is None:
                raise ValueError(f"{place} has the integer {value} in column {column!r}. {_NAMELESS}")
            if not 0 <= value < len(names):
                raise ValueError(
                    f"{place} has {value} in column {column!r}, but there are names for 0 to {len(names) - 1} only. "
                    "Drop rows without a label, or name all labels."
                )
            value = names[value]
        elif not isinstance(value, str):
            raise ValueError(
                f"{place} has {shown(value)} ({type(value).__name__}) in column {column!r}, but a label is a name "
                "or an integer."
            )
        elif names is not None and value not in names:
            raise ValueError(
                f"{place} has {shown(value)} in column {column!r}, which is none of the task's labels: "
                f"{shown(list(names))}."
            )
        labels.append(value)
    return labels


_NAMELESS = "Give the labels' names in the recipe, from 0, such as 'labels: [negative, positive]'."


def _check_dialogue(place: str, prompt: Any, completion: Any) -> None:
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str) and not is_chat(value):
            raise ValueError(
                f"{place} has the {name} {shown(value)}, but needs a text or a list of messages, each with 'role' "
                "and 'content'."
            )
    if isinstance(prompt, str) and not isinstance(completion, str):
        raise ValueError(f"{place} has a text as prompt, but messages as completion. Give both in the same form.")
    if not prompt or not completion:
        raise ValueError(f"{place} has an empty prompt or completion. Fill it in, or drop the row.")
