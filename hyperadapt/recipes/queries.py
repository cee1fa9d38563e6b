"""Rows that are to be answered: texts or prompts of tasks, which need no label."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import read_objects
from hyperadapt.recipes.recipe import Recipe, TaskRecipe
from hyperadapt.trainer.chats import is_chat, split_chat

Row = str | Mapping[str, Any]
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class Query:
    """A row of a task: one or two texts to classify, or a prompt; and the right answer, where it is known."""

    # For messages.
    place: str
    task: str
    texts: tuple[Any, ...]
    expected: str | None = None


def read_rows(source: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file: objects, or of a text file its lines that are not blank."""
    path = Path(source)
    if path.suffix not in FILES:
        raise ValueError(f"{str(path)!r} has an unknown ending. Give a file of {', '.join(FILES)}.")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file. Correct the path; a text that ends so goes into a .txt file.")
    if path.suffix == ".txt":
        return text_lines(path.read_bytes(), repr(str(path)))
    return list(read_objects(path, str(path)))


def text_lines(data: bytes, place: str) -> list[Row]:
    """The lines that are not blank. Only a line feed ends one, as for other tools: Python splits at much else."""
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not in UTF-8 ({error}). Save it as UTF-8.") from None
    return [line.removesuffix("\r") for line in lines if line.strip()]


def checked_queries(
    rows: Sequence[tuple[str, Row]], recipe: Recipe, task: str | None, task_column: str = "task"
) -> list[Query]:
    """The rows, each with its place for messages, as queries of a task, or of the one that a column of theirs names."""
    known = list(recipe.tasks)
    if task is not None and task not in known:
        raise ValueError(f"Unknown task {task!r}. Known tasks: {shown(known)}.")
    if not rows:
        raise ValueError("There is nothing to answer: the input has no rows.")
    queries = []
    for place, row in rows:
        name = task or (known[0] if len(known) == 1 else None)
        if isinstance(row, Mapping) and row.get(task_column) is not None:
            name = _own_task(place, row[task_column], task, task_column, known)
        if name is None:
            raise ValueError(
                f"{place} does not say which of the tasks {shown(known)} it is for. Name one for all rows (--task), or "
                f"give the rows a column {task_column!r}."
            )
        query = _classified if recipe.task_type == "SEQ_CLS" else _prompted
        queries.append(query(place, row, name, recipe.tasks[name]))
    return queries


def _own_task(place: str, named: Any, task: str | None, column: str, known: Sequence[str]) -> str:
    if named not in known:
        raise ValueError(f"{place} has the task {shown(named)} in column {column!r}, but the tasks are {shown(known)}.")
    if task not in (None, named):
        raise ValueError(
            f"{place} is of task {named!r} by its column {column!r}, but task {task!r} was asked for. Leave one of the "
            "two out."
        )
    return str(named)


def _classified(place: str, row: Row, name: str, task: TaskRecipe) -> Query:
    columns = [column for column in (task.text, task.text_pair) if column is not None]
    if isinstance(row, str):
        if len(columns) > 1:
            raise ValueError(
                f"{place} is one text, but task {name!r} classifies pairs. Give a file with the columns "
                f"{shown(columns)}."
            )
        return Query(place, name, (row,))
    texts = tuple(_value(place, row, column, str, "a text") for column in columns)
    return Query(place, name, texts, _label(place, row.get(task.label), name, task))


def _prompted(place: str, row: Row, name: str, task: TaskRecipe) -> Query:
    if isinstance(row, str):
        return Query(place, name, (row,))
    if task.prompt not in row and is_chat(row.get(task.messages)):
        chat = row[task.messages]
        if chat[-1]["role"] != "assistant":
            return Query(place, name, (chat,))
        prompt, completion = split_chat(place, chat)
        return Query(place, name, (prompt,), _content(completion))
    prompt = _value(place, row, task.prompt, str | list, "a text or a list of messages")
    if isinstance(prompt, list) and not is_chat(prompt):
        raise ValueError(
            f"{place} has {shown(prompt)} in column {task.prompt!r}, but messages have 'role' and 'content' each."
        )
    return Query(place, name, (prompt,), _content(row.get(task.completion)))


def _value(place: str, row: Mapping[str, Any], column: str, kind: Any, words: str) -> Any:
    if column not in row:
        raise ValueError(
            f"{place} has no column {column!r}, only {shown(list(row))}. Rename one, or name it in the recipe."
        )
    if not isinstance(row[column], kind):
        raise ValueError(
            f"{place} has {shown(row[column])} ({type(row[column]).__name__}) in column {column!r}, but needs {words}."
        )
    return row[column]


def _label(place: str, value: Any, name: str, task: TaskRecipe) -> str | None:
    """The name of a row's label, which may be a number; None if there is none."""
    names = task.labels or ()
    if value is None or value == "":
        return None
    if isinstance(value, str) and (value in names or not names):
        return value
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or re.fullmatch(r"\d{1,9}", str(value))
    if is_number and 0 <= int(value) < len(names):
        return names[int(value)]
    raise ValueError(
        f"{place} has {shown(value)} in column {task.label!r}, which is none of the labels of task {name!r}: "
        f"{shown(list(names))}. Correct it, or drop the column: answers need none."
    )


def _content(completion: Any) -> str | None:
    if isinstance(completion, list) and is_chat(completion):
        completion = completion[-1]["content"]
    return completion if isinstance(completion, str) and completion else None
