"""Starter recipes: what is guessed of data files, and that the recipe can be trained as it is."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hyperadapt.recipes import load_recipe
from hyperadapt.recipes.starter import BASES, CHAT_BASE, write_starter
from tests.support.tiny_runs import save_base, silent, write_rows

LETTERS = list("abcdefghijklmnopqrst")
CHAT = [{"role": "user", "content": "good?"}, {"role": "assistant", "content": "yes"}]


def rows(count: int, **columns: Sequence[Any]) -> list[dict[str, Any]]:
    return [{name: values[index % len(values)] for name, values in columns.items()} for index in range(count)]


def write_csv(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(content)


def test_tasks_and_splits_come_from_the_names_of_files(tmp_path: Path) -> None:
    texts = rows(4, text=["a", "b"], label=["x", "y"])
    for name in ("data/trec/train", "data/trec/valid", "data/trec/test", "sms-train", "sms_dev", "news.en"):
        write_rows(tmp_path / f"{name}.jsonl", texts)
    (tmp_path / "data" / "notes.txt").write_text("no data")
    # What a notebook keeps, and what a program has not finished.
    write_rows(tmp_path / "data" / ".ipynb_checkpoints" / "trec-checkpoint.jsonl", texts)
    write_rows(tmp_path / "data" / "trec" / ".old.jsonl", texts)
    files = [tmp_path / f"{name}.jsonl" for name in ("sms-train", "sms_dev", "news.en")]
    made = write_starter([tmp_path / "data", *files], tmp_path / "recipes" / "first.yaml")
    tasks = load_recipe(tmp_path / "recipes" / "first.yaml").tasks
    assert {name: (task.train, task.validation, task.test) for name, task in tasks.items()} == {
        "trec": tuple(str(tmp_path / "data" / "trec" / f"{name}.jsonl") for name in ("train", "valid", "test")),
        "sms": (str(tmp_path / "sms-train.jsonl"), str(tmp_path / "sms_dev.jsonl"), None),
        "news.en": (str(tmp_path / "news.en.jsonl"), None, None),
    }
    assert made.recipe.output_dir == "runs/first"
    assert made.guesses[0] == "trec: texts in 'text', 2 labels in 'label'; train, validation, test"
    assert made.guesses[2].endswith("; train, no validation and no test")
    text = (tmp_path / "recipes" / "first.yaml").read_text()
    assert "train: ../data/trec/train.jsonl" in text
    assert all(f"# - {guess}\n" in text for guess in made.guesses)


@pytest.mark.parametrize(
    ("content", "task_type", "fields"),
    [
        (rows(4, text=["a"], label=["x", "y"]), "SEQ_CLS", {}),
        (
            rows(4, id=[1, 2, 3, 4], Sentence=["a"], Category=["x", "y"]),
            "SEQ_CLS",
            {"text": "Sentence", "label": "Category"},
        ),
        (
            rows(4, premise=["a"], hypothesis=["b"], label=["x", "y"]),
            "SEQ_CLS",
            {"text": "premise", "text_pair": "hypothesis"},
        ),
        # No name tells, but one column has few values.
        (rows(8, words=["a b", "b c", "d e", "e f"], kind=["x", "y"]), "SEQ_CLS", {"text": "words", "label": "kind"}),
        (
            rows(4, text=["a"], label=[0, 2]),
            "SEQ_CLS",
            {"labels": ("mine 0", "mine 1", "mine 2")},
        ),
        (rows(4, prompt=["a"], completion=["b"], label=["x"]), "CAUSAL_LM", {}),
        (
            rows(4, instruction=["a"], input=["c"], output=["b"]),
            "CAUSAL_LM",
            {"prompt": "instruction", "completion": "output"},
        ),
        (rows(4, prompt=[CHAT[:1]], completion=[CHAT[1:]]), "CAUSAL_LM", {}),
        (rows(4, messages=[CHAT], source=["s"]), "CAUSAL_LM", {}),
        (rows(4, talk=[CHAT]), "CAUSAL_LM", {"messages": "talk"}),
        (rows(4, question=["a"], answer=["b"], label=["x", "y"]), "SEQ_CLS", {"text": "question"}),
        # All of them differ, so the targets are no labels; a file of few rows may have one for each label.
        (rows(12, source=LETTERS, target=LETTERS), "CAUSAL_LM", {"prompt": "source", "completion": "target"}),
        (rows(3, source=LETTERS, target=LETTERS), "CAUSAL_LM", {"prompt": "source", "completion": "target"}),
        (rows(3, text=LETTERS, target=LETTERS), "SEQ_CLS", {"label": "target"}),
        (rows(20, text=LETTERS, label=LETTERS, topic=["x", "y"]), "SEQ_CLS", {"label": "topic"}),
    ],
)
def test_columns_are_found(
    tmp_path: Path, content: list[dict[str, Any]], task_type: str, fields: dict[str, Any]
) -> None:
    write_rows(tmp_path / "mine.jsonl", content)
    recipe = write_starter([tmp_path / "mine.jsonl"], tmp_path / "recipe.yaml").recipe
    is_chat = any(isinstance(value, list) for value in content[0].values())
    assert recipe.task_type == task_type
    assert recipe.base_model == (CHAT_BASE if is_chat else BASES[task_type])
    columns = ("text", "text_pair", "label", "labels", "prompt", "completion", "messages")
    task, plain = recipe.tasks["mine"], type(recipe.tasks["mine"])()
    assert {name: getattr(task, name) for name in columns if getattr(task, name) != getattr(plain, name)} == fields


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    content, path = rows(4, text=["a", "b"], label=[0, 1], note=["n"]), tmp_path / f"mine{suffix}"
    if suffix in (".csv", ".tsv"):
        write_csv(path, content)
    elif suffix == ".parquet":
        Dataset.from_list(content).to_parquet(str(path))
    elif suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        write_rows(path, content)
    made = write_starter([path], tmp_path / "recipe.yaml")
    assert made.recipe.tasks["mine"].labels == ("mine 0", "mine 1")
    assert made.guesses[0].startswith(
        "mine: texts in 'text', 2 labels in 'label', which are integers: give them better names; not used: 'note'; "
    )


def test_names_of_labels_in_a_file_are_taken(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(rows(4, text=["a"], label=[0, 1]), features=features).to_parquet(str(tmp_path / "mine.parquet"))
    made = write_starter([tmp_path / "mine.parquet"], tmp_path / "recipe.yaml")
    assert made.recipe.tasks["mine"].labels is None
    assert made.guesses[0].startswith("mine: texts in 'text', 2 labels in 'label'; ")


@pytest.mark.parametrize(("letters", "expected"), [(10, 32), (97, 64), (500, 256), (90_000, 1024)])
def test_the_length_suits_the_longest_row(tmp_path: Path, letters: int, expected: int) -> None:
    write_rows(tmp_path / "mine.jsonl", rows(4, text=["a", "a" * (letters - 1)], label=["x"]))
    assert write_starter([tmp_path / "mine.jsonl"], tmp_path / "recipe.yaml").recipe.max_length == expected


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_starter_trains(tmp_path: Path, task_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base", task_type)
    names = ("text", "label") if task_type == "SEQ_CLS" else ("question", "reply")
    content = rows(8, **{names[0]: ["good", "bad"], names[1]: ["yes", "no"]})
    for split in ("train", "test"):
        write_rows(tmp_path / "mood" / f"{split}.jsonl", content)
    path = tmp_path / "recipe.yaml"
    write_starter([tmp_path / "mood"], path, str(tmp_path / "base"))
    assert "base_model: base\n" in path.read_text()
    path.write_text(path.read_text() + "training: {max_steps: 1, use_cpu: true}\n")
    monkeypatch.chdir(tmp_path)
    assert (silent(load_recipe(path)) / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": rows(4, score=[0.1, 0.2])}, "has the columns ['score'], among which neither texts with labels"),
        (
            {"a.jsonl": rows(4, text=["a"], label=[0.5])},
            "a.jsonl, row 1 has 0.5 (float) in column 'label', but labels are names, or integers in every row. Write",
        ),
        ({"a.jsonl": rows(4, text=["a"], label=["x", True])}, "a.jsonl, row 2 has True (bool) in column 'label'"),
        ({"a.jsonl": rows(4, text=["a"], label=[1, "x"])}, "a.jsonl, row 2 has 'x' (str) in column 'label'"),
        ({"a.jsonl": rows(4, text=["a"], label=["x", None])}, "a.jsonl, row 2 has nothing in column 'label'. Fill"),
        ({"a.jsonl": rows(4, text=["a", None], label=["x"])}, "a.jsonl, row 2 has nothing in column 'text'. Fill"),
        ({"a.jsonl": rows(4, text=["a"], label=["x", ""])}, "a.jsonl, row 2 has an empty label in column 'label'."),
        (
            {"a.jsonl": rows(20, text=LETTERS, label=LETTERS, language=["en"])},
            "a.jsonl has 20 values in the 20 rows of column 'label', which are too many for labels. If they are answ",
        ),
        ({"a.jsonl": rows(4, text=["a"], label=[-1, 0])}, "has integers from -1 to 0 in column 'label', but labels"),
        ({"a_test.jsonl": rows(4, text=["a"], label=["x"])}, "Task 'a' has no rows to train on, only "),
        (
            {"a.jsonl": rows(4, text=["a"], label=["x"]), "b.jsonl": rows(4, messages=[CHAT])},
            "Task 'a' has labels, but task 'b' has answers, and a recipe trains one kind.",
        ),
        (
            {"a.jsonl": rows(4, text=["a"], label=["x"]), "a_train.jsonl": rows(4, text=["a"], label=["x"])},
            "would both be the train split of task 'a'.",
        ),
        (
            {"a.jsonl": rows(4, text=["a"], label=["x"]), "a_dev.jsonl": rows(1, text=["a"], label=["y"])},
            "none of the task's labels",
        ),
        ({"a.txt": []}, "has an unknown ending. Give files of .csv"),
        ({"mean.jsonl": rows(4, text=["a"], label=["x"])}, "A task cannot have the name 'mean'."),
    ],
)
def test_errors_write_nothing(tmp_path: Path, files: dict[str, list[dict[str, Any]]], message: str) -> None:
    for name, content in files.items():
        write_rows(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_starter([tmp_path / name for name in files], tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", rows(4, text=["a"], label=["x"]))
    (tmp_path / "recipe.yaml").write_text("mine: true\n")
    with pytest.raises(FileExistsError, match=r"recipe\.yaml' is there already\. Name another file, or remove it\."):
        write_starter([tmp_path / "mine.jsonl"], tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine: true\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data"):
        write_starter([tmp_path / "empty"], tmp_path / "new.yaml")
