"""Columns from files of every kind and from data sets, and errors that name task, file, row and column."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hyperadapt.recipes import TaskRecipe, columns
from hyperadapt.recipes.columns import Columns, dataset_columns, read_columns

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "línea\nzwei", "label": "y"}]


def write_csv(path: Path, delimiter: str = ",") -> None:
    lines = [delimiter.join(["text", "label"])]
    lines += [delimiter.join('"' + row[name].replace('"', '""') + '"' for name in row) for row in ROWS]
    path.write_text("\n".join(lines), encoding="utf-8")


WRITERS: dict[str, Callable[[Path], Any]] = {
    ".csv": write_csv,
    ".tsv": lambda path: write_csv(path, "\t"),
    ".json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    ".jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig"),
    ".parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
}


def read(path: Path, names: tuple[str, ...] = ("text", "label")) -> Columns:
    return read_columns(TaskRecipe(train=str(path)), "one", "train", names)


def fails(path: Path, message: str, names: tuple[str, ...] = ("text", "label")) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Task 'one', {path}{message}")):
        read(path, names)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    found = read(path)
    assert found.values == {name: [row[name] for row in ROWS] for name in ("text", "label")}
    assert found.names == {}
    assert found.is_text == (suffix in (".csv", ".tsv"))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_missing_column_or_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    fails(path, " is not there. Correct the path in the recipe.")
    WRITERS[suffix](path)
    fails(path, " has no column 'lable', only ['text', 'label']. Rename one", ("text", "lable"))


def test_values_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "2024-01-01", "label": 1}\n{"text": ["a"], "label": true}\n')
    assert read(path).values == {"text": ["2024-01-01", ["a"]], "label": [1, True]}
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nNA,1\nnull,\n")
    assert read(path).values == {"text": ["NA", "null"], "label": ["1", ""]}


def test_names_of_integers_come_from_the_data_set(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    for found in (read(tmp_path / "rows.parquet"), dataset_columns(dataset, "there", ["text", "label"])):
        assert found.values == {"text": ["a", "b"], "label": [1, 0]}
        assert found.names == {"label": ["no", "yes"]}


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".csv", "text,label\na,x,y\n", ", row 1 has more values than the first line has names. Put text with ','"),
        (".csv", "text,label\na,x\nb\n", ", row 2 has nothing in column 'label'. Fill it in, or drop the row."),
        (".csv", 'text,label\na,x\n"b" c,x\n', ", row 2 cannot be read (',' expected after '\"'). Check its quotes."),
        (".csv", "text,label,text\na,x,b\n", " has two columns 'text' in its first line. Rename one, or drop it."),
        (".csv", "text,label\n", " has no rows."),
        (".csv", "", " has no rows."),
        (".jsonl", "", " has no rows."),
        (".json", "[]", " has no rows."),
        (".json", "{}", " holds {}, but must be a list of objects, one for each row."),
        (".json", "[\n{},\n{]\n", ", line 3 is no JSON: Expecting property name"),
        (".jsonl", '{"text": "a", "label": "x"}\n\n{"text": \n', ", line 3 is no JSON: Expecting value."),
        (".jsonl", '{"text": "a", "label": "x"}\n5\n', ", row 2 is 5, but must be an object: column -> value."),
        (".jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', ", row 2 has nothing in column 'label'."),
        (".jsonl", '{"text": null, "label": "x"}\n', ", row 1 has nothing in column 'text'."),
        (".jsonl", "[" * 100_000, ", line 1 is no JSON: "),
        (".parquet", "text", " cannot be read as Parquet: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(text, encoding="utf-8")
    fails(path, message)


def test_texts_may_be_long_and_columns_without_a_name(tmp_path: Path) -> None:
    path, limit = tmp_path / "rows.csv", csv.field_size_limit()
    path.write_text(f"text,label,,\n{'a' * 200_000},x,,\n")
    assert read(path).values == {"text": ["a" * 200_000], "label": ["x"]}
    assert csv.field_size_limit() == limit


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\ncaf\xe9,x\n")
    fails(path, " is not in UTF-8 (")


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        asked.append((arguments, options))
        if options["split"] == "none":
            raise ValueError('Unknown split "none".')
        return Dataset.from_dict({"text": ["a", None], "label": [0, 1]})

    monkeypatch.setattr(columns, "load_dataset", load_dataset)
    task = TaskRecipe(dataset="user/reviews", name="english", revision="abc", train="train[:2]", test="none")
    assert read_columns(task, "one", "train", ["label"]).values == {"label": [0, 1]}
    assert asked == [(("user/reviews", "english"), {"split": "train[:2]", "revision": "abc"})]
    place = re.escape("Task 'one', user/reviews")
    with pytest.raises(ValueError, match=f"{place}, split 'train\\[:2\\]', row 2 has nothing in column 'text'"):
        read_columns(task, "one", "train", ["text"])
    with pytest.raises(ValueError, match=f"{place}: load_dataset could not load split 'none': Unknown split"):
        read_columns(task, "one", "test", ["text"])
    with pytest.raises(ValueError, match="there has no rows"):
        dataset_columns(Dataset.from_dict({"text": []}), "there", ["text"])


def test_a_folder_is_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    Dataset.from_list(ROWS * 3).to_csv(tmp_path / "reviews" / "train.csv")
    task = TaskRecipe(dataset=str(tmp_path / "reviews"), train="train[:2]")
    assert read_columns(task, "one", "train", ["label"]).values == {"label": ["x", "y"]}
