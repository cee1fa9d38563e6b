"""Files of new tasks: what they mean, and every problem of them with its line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hyperadapt.recipes import Additions, Recipe, RecipeError, TaskRecipe, load_additions
from tests.support.tiny_runs import labelled_rows, write_rows

KNOWN = Recipe(
    "base", "run", {"task_type": "SEQ_CLS"}, {"mail": TaskRecipe(train="mail.jsonl"), "letters": TaskRecipe()}
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a file of new tasks is, beside its rows."""
    write_rows(tmp_path / "data" / "new.jsonl", labelled_rows(4, 1, {"a": "positive", "b": "negative"}))
    return tmp_path / "more.yaml"


def test_all_fields_are_read(file: Path) -> None:
    file.write_text(
        "tasks:\n  new: {train: data/new.jsonl, test: data/new.jsonl, label: label, description: [Tell a., Tell b.]}\n"
        "  newer: {train: data/new.jsonl}\nreplay: {mail: data/new.jsonl}\nsteps: 7\nlearning_rate: 1e-3\n"
    )
    rows = str(file.parent / "data" / "new.jsonl")
    assert load_additions(file, KNOWN) == Additions(
        {
            "new": TaskRecipe(description=("Tell a.", "Tell b."), train=rows, test=rows),
            "newer": TaskRecipe(train=rows),
        },
        "replay",
        {"mail": rows},
        7,
        1e-3,
    )
    file.write_text("keep: exact\ntasks:\n  new: {description: Tell a.}\n  newer: {train: data/new.jsonl}\nsteps: 7\n")
    tasks = {"new": TaskRecipe(description="Tell a."), "newer": TaskRecipe(train=rows)}
    assert load_additions(file, KNOWN) == Additions(tasks, "exact", steps=7)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("keep: exact\n", 1, "tasks is missing."),
        ("[1]\n", 1, "The file is [1], but must hold lines of 'field: value'."),
        ("tasks: [new]\n", 1, "tasks is ['new'], but must hold a section for each task, under its name."),
        ("tasks:\n  new:\n    file: a.csv\n", 3, "tasks.new.file is no field of a SEQ_CLS task. Did you mean 'train'?"),
        (
            "tasks:\n  mail: {train: data/new.jsonl}\n",
            2,
            "tasks.mail: the adapter already has a task 'mail'. Give the new one another name.",
        ),
        (
            "tasks:\n  new: {description: Tell a.}\n",
            2,
            "tasks.new.train is missing, and keep='replay' trains on its rows. Name a file, or set keep: exact, which "
            "can do with a description.",
        ),
        (
            "keep: exact\ntasks:\n  new: {labels: [a, b]}\n",
            3,
            "tasks.new has neither rows (train) nor a description to go by. Give one of the two.",
        ),
        ("keep: frozen\n", 1, "keep='frozen' is unknown. Choose one of 'replay', 'exact'."),
        (
            "keep: exact\ntasks:\n  new: {description: Tell a.}\nsteps: 5\n",
            4,
            "steps is for a training, but no task has rows to train on (train). Leave it out, or name some.",
        ),
        (
            "keep: exact\ntasks:\n  new: {train: data/new.jsonl}\nreplay: {mail: data/new.jsonl}\n",
            4,
            "replay names rows of known tasks, which keep='exact' holds without them. Leave it out, or set keep: "
            "replay.",
        ),
        (
            "tasks:\n  new: {train: data/new.jsonl}\nreplay: {mial: data/new.jsonl}\n",
            3,
            "replay.mial names no task that the adapter knows. Did you mean 'mail'? It knows ['mail', 'letters'].",
        ),
        (
            "tasks:\n  new: {train: data/new.jsonl}\nreplay: {mail: none.jsonl}\n",
            3,
            "replay.mail='none.jsonl' is no file: there is none at ",
        ),
        ("replay: {mail: 5}\n", 1, "replay.mail=5 must be a text, not int."),
        ("replay: []\n", 1, "replay=[] must hold lines of 'task: file', each with a known task."),
        (
            "base_model: bert\n",
            1,
            "base_model cannot be changed: it is that of the adapter which learns on. Leave it out.",
        ),
        ("\ntraining: {max_steps: 5}\n", 2, "training cannot be changed: it is that of the adapter which learns on."),
        ("max_steps: 5\n", 1, "max_steps is no field of a file of new tasks. Did you mean 'steps'?"),
        ("steps: 0\n", 1, "steps=0 must be at least 1."),
    ],
)
def test_what_is_wrong_is_told_with_its_line(file: Path, text: str, line: int, message: str) -> None:
    file.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(f"{file}:{line}: {message}")):
        load_additions(file, KNOWN)


def test_columns_are_those_of_the_adapters_kind(file: Path) -> None:
    file.write_text("tasks:\n  new: {train: data/new.jsonl, prompt: text}\n")
    with pytest.raises(RecipeError, match=re.escape("tasks.new.prompt is no field of a SEQ_CLS task.")):
        load_additions(file, KNOWN)
    language_model = replace(KNOWN, adapter={"task_type": "CAUSAL_LM"})
    assert load_additions(file, language_model).tasks["new"].prompt == "text"


def test_a_wrong_keep_is_not_taken_for_another(file: Path) -> None:
    file.write_text("keep: frozen\ntasks:\n  new: {description: Tell a.}\n  newer: {}\n")
    with pytest.raises(RecipeError) as error:
        load_additions(file, KNOWN)
    assert [problem.line for problem in error.value.problems] == [1]


def test_all_problems_are_told_at_once(file: Path) -> None:
    file.write_text("tasks:\n  mail: {}\n  mean: {}\nlearning_rate: fast\n")
    with pytest.raises(RecipeError) as error:
        load_additions(file, KNOWN)
    assert [problem.line for problem in error.value.problems] == [2, 2, 3, 4]
