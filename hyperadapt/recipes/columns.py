"""Columns of a task's data, from a file or from a data set, with the row and the column of whatever is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset

from hyperadapt.config.checks import shown
from hyperadapt.recipes.recipe import TaskRecipe


@dataclass(frozen=True)
class Columns:
    """Some columns of a task's rows."""

    # The task and the file, for messages.
    place: str
    # Column -> one value for each row, as it is in the file.
    values: Mapping[str, Sequence[Any]]
    # Column of integers -> what they stand for, where the data set says it.
    names: Mapping[str, Sequence[str]]
    # Whether the file holds nothing but text, so that integers are text, too.
    is_text: bool = False


def read_columns(
    task: TaskRecipe, name: str, split: str, columns: Sequence[str], instead: Sequence[str] = ()
) -> Columns:
    """Columns of a split that the task has, with a value in every row; errors name task, file, row and column.

    Where they are not there, but those given `instead` are, it is these.
    """
    source = getattr(task, split)
    place = f"Task {name!r}, {task.dataset or source}"
    if task.dataset is not None:
        return dataset_columns(_load_dataset(task, source, place), f"{place}, split {source!r}", columns, instead)
    path = Path(source)
    if path.suffix == ".parquet":
        return dataset_columns(_read_parquet(path, place), place, columns, instead)
    rows = read_objects(path, place)
    columns = _chosen_columns(list(rows[0]) if rows else None, columns, instead, place)
    values = {column: [row.get(column) for row in rows] for column in columns}
    _check_values(values, place)
    return Columns(place, values, {}, path.suffix in _DELIMITERS)


def file_columns(path: Path, place: str) -> Columns:
    """All columns of a file, with None where a row has no value; `place` names the file in errors."""
    if path.suffix == ".parquet":
        dataset = _read_parquet(path, place)
        return dataset_columns(dataset, place, dataset.column_names, may_lack=True)
    rows = read_objects(path, place)
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    return Columns(place, values, {}, path.suffix in _DELIMITERS)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Letters of a field. It is a C long, which has 32 bits on some machines.
_LONGEST = 2**31 - 1


def read_objects(path: Path, place: str) -> list[dict[str, Any]]:
    """The rows of a file, column -> value; `place` names it in errors."""
    if path.suffix == ".parquet":
        return list(_read_parquet(path, place).to_list())
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix in _DELIMITERS:
                return list(_csv_rows(file, _DELIMITERS[path.suffix], place))
            rows = list(_json_lines(file, place)) if path.suffix == ".jsonl" else _json(file.read(), place, 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not in UTF-8 ({error}). Save it as UTF-8.") from None
    except FileNotFoundError:
        raise ValueError(f"{place} is not there. Correct the path in the recipe.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{place} holds {shown(rows)}, but must be a list of objects, one for each row.")
    for index, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{place}, row {index} is {shown(row)}, but must be an object: column -> value.")
    return rows


def _csv_rows(file: Iterable[str], delimiter: str, place: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    index = 0
    # It is the module's, of which other code may rely on another one.
    limit = csv.field_size_limit(_LONGEST)
    try:
        _check_header(reader.fieldnames or (), place)
        for index, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(
                    f"{place}, row {index} has more values than the first line has names. Put text with {delimiter!r} "
                    "in quotes."
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"{place}, row {index + 1} cannot be read ({error}). Check its quotes.") from None
    finally:
        csv.field_size_limit(limit)


def _check_header(names: Sequence[str], place: str) -> None:
    for name in names:
        # Those without a name, as spreadsheets leave at the end of lines, cannot be asked for.
        if name and names.count(name) > 1:
            raise ValueError(f"{place} has two columns {name!r} in its first line. Rename one, or drop it.")


def _json_lines(file: Iterable[str], place: str) -> Iterator[Any]:
    for line, text in enumerate(file, 1):
        if text.strip():
            yield _json(text.strip(), place, line)


def _json(text: str, place: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = line + getattr(error, "lineno", 1) - 1
        raise ValueError(f"{place}, line {where} is no JSON: {getattr(error, 'msg', error)}.") from None


def _read_parquet(path: Path, place: str) -> Dataset:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except FileNotFoundError:
        raise ValueError(f"{place} is not there. Correct the path in the recipe.") from None
    except pyarrow.ArrowException as error:
        raise ValueError(f"{place} cannot be read as Parquet: {error}") from error


def _load_dataset(task: TaskRecipe, split: str, place: str) -> Dataset:
    try:
        return load_dataset(task.dataset, task.name, split=split, revision=task.revision)
    except Exception as error:
        raise ValueError(f"{place}: load_dataset could not load split {split!r}: {error}") from error


def dataset_columns(
    dataset: Dataset, place: str, columns: Sequence[str], instead: Sequence[str] = (), *, may_lack: bool = False
) -> Columns:
    """As ``read_columns``, of a data set; `place` names the task and the source in errors."""
    columns = _chosen_columns(dataset.column_names if len(dataset) else None, columns, instead, place)
    values = {column: list(dataset[column]) for column in columns}
    if not may_lack:
        _check_values(values, place)
    features = {column: dataset.features[column] for column in columns}
    names = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    return Columns(place, values, names)


def _chosen_columns(
    known: Sequence[str] | None, columns: Sequence[str], instead: Sequence[str], place: str
) -> Sequence[str]:
    """The columns, or those instead, of those that the rows have; None if there is no row."""
    if known is None:
        raise ValueError(f"{place} has no rows. Give it rows, or leave the split out.")
    if instead and set(instead) <= set(known) and not set(columns) & set(known):
        return instead
    for column in columns:
        if column not in known:
            raise ValueError(
                f"{place} has no column {column!r}, only {shown(list(known))}. Rename one, or name it in the recipe."
            )
    return columns


def _check_values(values: Mapping[str, Sequence[Any]], place: str) -> None:
    for column, entries in values.items():
        for row, entry in enumerate(entries, 1):
            if entry is None:
                raise ValueError(f"{place}, row {row} has nothing in column {column!r}. Fill it in, or drop the row.")
