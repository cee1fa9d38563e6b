"""Rows as a recipe names them: labels by name, some of many, and errors that name the row."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hyperadapt.recipes import Recipe, TaskRecipe
from hyperadapt.recipes.columns import Columns
from hyperadapt.recipes.rows import TaskRows, checked_rows, read_rows, sampled
from tests.support.tiny_runs import write_rows


def labelled(given: list[Any], *, names: list[str] | None = None, is_text: bool = False, **task: Any) -> TaskRows:
    values = {"text": ["a"] * len(given), "label": given}
    columns = Columns("here", values, {"label": names} if names else {}, is_text)
    return checked_rows(columns, TaskRecipe(**task), "SEQ_CLS")


@pytest.mark.parametrize(
    ("labels", "options", "found", "names"),
    [
        (["x", "y", "x"], {}, ["x", "y", "x"], ("x", "y")),
        (["x", "y"], {"labels": ("y", "z", "x")}, ["x", "y"], ("y", "z", "x")),
        ([1, 0], {"labels": ("no", "yes")}, ["yes", "no"], ("no", "yes")),
        ([1, 0], {"names": ["no", "yes"]}, ["yes", "no"], ("no", "yes")),
        ([1, 0], {"names": ["0", "1"], "labels": ("no", "yes")}, ["yes", "no"], ("no", "yes")),
        (["1", "0"], {"labels": ("no", "yes"), "is_text": True}, ["yes", "no"], ("no", "yes")),
        (["1", "0"], {"labels": ("0", "1"), "is_text": True}, ["1", "0"], ("0", "1")),
        (["1", "x"], {"is_text": True}, ["1", "x"], ("1", "x")),
        (["1", "0"], {}, ["1", "0"], ("1", "0")),
    ],
)
def test_labels_get_their_names(
    labels: list[Any], options: dict[str, Any], found: list[str], names: tuple[str, ...]
) -> None:
    rows = labelled(labels, **options)
    assert (list(rows.labels), rows.names) == (found, names)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["x", 1], {}, "here, row 2 has the integer 1 in column 'label'. Give the labels' names in the recipe"),
        (["1", "0"], {"is_text": True}, "here has integers in column 'label'. Give the labels' names in the recipe"),
        (
            ["x", "z"],
            {"labels": ("x", "y")},
            "row 2 has 'z' in column 'label', which is none of the task's labels: ['x',",
        ),
        ([0, 2], {"labels": ("x", "y")}, "here, row 2 has 2 in column 'label', but there are names for 0 to 1 only."),
        ([0, -1], {"names": ["x", "y"]}, "here, row 2 has -1 in column 'label', but there are names for 0 to 1 only."),
        (["x", 1.5], {}, "here, row 2 has 1.5 (float) in column 'label', but a label is a name or an integer."),
        (
            [True],
            {"labels": ("x", "y")},
            "here, row 1 has True (bool) in column 'label', but a label is a name or an int",
        ),
        ([["x"]], {}, "here, row 1 has ['x'] (list) in column 'label'"),
        (["x", ""], {}, "here, row 2 has an empty label in column 'label'. Fill it in, or drop the row."),
        (["0", " "], {"labels": ("x", "y"), "is_text": True}, "here, row 2 has an empty label in column 'label'."),
    ],
)
def test_labels_that_are_wrong(labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        labelled(labels, **options)


def test_a_text_must_be_one() -> None:
    columns = Columns("here", {"text": ["a", "b"], "other": ["c", 5], "label": ["x", "y"]}, {})
    message = "here, row 2 has 5 (int) in column 'other', but needs a text."
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_rows(columns, TaskRecipe(text_pair="other"), "SEQ_CLS")


def test_rows_are_read_as_the_recipe_says(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"s": f"{index}", "t": "b", "stars": index // 10} for index in range(20)])
    task = TaskRecipe(train=str(tmp_path / "a.jsonl"), text="s", text_pair="t", label="stars", labels=("bad", "good"))
    recipe = Recipe("base", "out", {"task_type": "SEQ_CLS"}, {"one": task}, max_rows={"train": 12})
    rows = read_rows(recipe, "one", "train")
    numbers = [int(texts[0]) for texts in rows.texts]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 12
    assert list(rows.labels) == ["good" if number >= 10 else "bad" for number in numbers]
    # Sorted files are the usual case, of which the first rows would have one label.
    assert min(Counter(rows.labels).values()) >= 3
    assert read_rows(recipe, "one", "train") == rows
    assert sampled(rows, 12) is sampled(rows, None) is rows


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (5, "yes", "here, row 1 has the prompt 5, but needs a text or a list of messages"),
        ("a", [], "here, row 1 has the completion [], but needs a text or a list of messages"),
        ([{"role": "user"}], "yes", "here, row 1 has the prompt [{'role': 'user'}], but needs"),
        (
            "a",
            [{"role": "assistant", "content": "yes"}],
            "here, row 1 has a text as prompt, but messages as completion.",
        ),
        ("a", "", "here, row 1 has an empty prompt or completion."),
        ("", "a", "here, row 1 has an empty prompt or completion."),
    ],
)
def test_dialogues_that_are_wrong(prompt: Any, completion: Any, message: str) -> None:
    columns = Columns("here", {"prompt": [prompt], "completion": [completion]}, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_rows(columns, TaskRecipe(), "CAUSAL_LM")


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_the_last_message_of_a_chat_is_what_is_learned(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"messages": [*CHAT, *CHAT]}, {"messages": CHAT}])
    write_rows(tmp_path / "b.jsonl", [{"messages": CHAT, "prompt": "a", "completion": "c"}])
    write_rows(tmp_path / "c.jsonl", [{"talk": CHAT}])
    tasks = {name: TaskRecipe(train=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    tasks["c"] = TaskRecipe(train=str(tmp_path / "c.jsonl"), messages="talk")
    recipe = Recipe("base", "out", {"task_type": "CAUSAL_LM"}, tasks)
    assert read_rows(recipe, "a", "train").texts == [([*CHAT, CHAT[0]], CHAT[1:]), (CHAT[:1], CHAT[1:])]
    # Prompt and completion come first.
    assert read_rows(recipe, "b", "train").texts == [("a", "c")]
    assert read_rows(recipe, "c", "train").texts == [(CHAT[:1], CHAT[1:])]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "here, row 1 has the messages 'hello', but needs a list of them, each with 'role' and 'content'."),
        ([{"role": "user"}], "here, row 1 has the messages [{'role': 'user'}], but needs a list of them"),
        (CHAT[:1], "here, row 1 ends with a message of the role 'user', but what is learned is the assistant's last"),
        (CHAT[1:], "here, row 1 has nothing before the assistant's message, so there is no prompt."),
    ],
)
def test_chats_that_are_wrong(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_rows(Columns("here", {"messages": [messages]}, {}), TaskRecipe(), "CAUSAL_LM")
