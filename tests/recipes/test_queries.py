"""Rows that are to be answered: of which task, with which texts, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hyperadapt.recipes.queries import Query, checked_queries, read_rows
from hyperadapt.recipes.recipe import Recipe, TaskRecipe


def recipe(task_type: str, **tasks: Mapping[str, Any]) -> Recipe:
    return Recipe("base", "out", {"task_type": task_type}, {name: TaskRecipe(**task) for name, task in tasks.items()})


CLASSES = recipe("SEQ_CLS", mail={"labels": ("spam", "ham")}, pairs={"text": "first", "text_pair": "second"})
WRITER = recipe("CAUSAL_LM", write={}, shout={"prompt": "ask", "completion": "say"})
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("made", "row", "task", "expected"),
    [
        (CLASSES, "good", "mail", Query("here", "mail", ("good",))),
        (CLASSES, {"text": "good", "task": "mail"}, None, Query("here", "mail", ("good",))),
        (CLASSES, {"text": "good", "label": "ham"}, "mail", Query("here", "mail", ("good",), "ham")),
        (CLASSES, {"text": "good", "label": 0}, "mail", Query("here", "mail", ("good",), "spam")),
        (CLASSES, {"text": "good", "label": "1"}, "mail", Query("here", "mail", ("good",), "ham")),
        (CLASSES, {"text": "good", "label": None, "task": "mail"}, "mail", Query("here", "mail", ("good",))),
        (CLASSES, {"first": "a", "second": "b", "label": "x"}, "pairs", Query("here", "pairs", ("a", "b"), "x")),
        (WRITER, "hi", "write", Query("here", "write", ("hi",))),
        (WRITER, {"prompt": "hi", "completion": "hello"}, "write", Query("here", "write", ("hi",), "hello")),
        (WRITER, {"ask": "hi", "task": "shout"}, None, Query("here", "shout", ("hi",))),
        (WRITER, {"messages": CHAT}, "write", Query("here", "write", (CHAT[:1],), "hello")),
        (WRITER, {"messages": CHAT[:1]}, "write", Query("here", "write", (CHAT[:1],))),
        (WRITER, {"prompt": CHAT[:1], "completion": CHAT[1:]}, "write", Query("here", "write", (CHAT[:1],), "hello")),
    ],
)
def test_rows_become_queries(made: Recipe, row: Any, task: str | None, expected: Query) -> None:
    assert checked_queries([("here", row)], made, task) == [expected]


def test_an_only_task_need_not_be_named() -> None:
    [query] = checked_queries([("here", "good")], recipe("SEQ_CLS", mail={}), None)
    assert query.task == "mail"


def test_another_column_may_name_the_task() -> None:
    [query] = checked_queries([("here", {"text": "good", "kind": "mail", "task": 3})], CLASSES, None, "kind")
    assert query.task == "mail"


BAD = [
    (CLASSES, [], None, "There is nothing to answer: the input has no rows."),
    (CLASSES, ["good"], "news", "Unknown task 'news'. Known tasks: ['mail', 'pairs']."),
    (
        CLASSES,
        ["good"],
        None,
        "here does not say which of the tasks ['mail', 'pairs'] it is for. Name one for all rows (--task), or give the "
        "rows a column 'task'.",
    ),
    (CLASSES, [{"text": "a", "task": 5}], None, "here has the task 5 in column 'task', but the tasks are ['mail', 'pa"),
    (
        CLASSES,
        [{"text": "a", "task": "mail"}],
        "pairs",
        "here is of task 'mail' by its column 'task', but task 'pairs' was asked for. Leave one of the two out.",
    ),
    (
        CLASSES,
        ["a"],
        "pairs",
        "here is one text, but task 'pairs' classifies pairs. Give a file with the columns ['fir",
    ),
    (CLASSES, [{"txt": "a"}], "mail", "here has no column 'text', only ['txt']. Rename one, or name it in the recipe."),
    (CLASSES, [{"text": 5}], "mail", "here has 5 (int) in column 'text', but needs a text."),
    (
        CLASSES,
        [{"text": "a", "label": "eggs"}],
        "mail",
        "here has 'eggs' in column 'label', which is none of the labels of task 'mail': ['spam', 'ham']. Correct it, "
        "or drop the column: answers need none.",
    ),
    (CLASSES, [{"text": "a", "label": True}], "mail", "here has True in column 'label', which is none of the labels"),
    (CLASSES, [{"text": "a", "label": 2}], "mail", "here has 2 in column 'label', which is none of the labels"),
    (WRITER, [{"prompt": ["a"]}], "write", "here has ['a'] in column 'prompt', but messages have 'role' and 'content'"),
    (WRITER, [{"text": "a"}], "write", "here has no column 'prompt', only ['text']."),
]


@pytest.mark.parametrize(("made", "rows", "task", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_wrong_rows_are_refused(made: Recipe, rows: list[Any], task: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        checked_queries([("here", row) for row in rows], made, task)


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n two \r\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.txt") == ["one", " two "]
    # All else than a line feed, which may stand in a text, ends no line.
    (tmp_path / "a.txt").write_bytes("a\u2028b\x0cc\x85d\re\n\nf\u2029g".encode())
    assert read_rows(tmp_path / "a.txt") == ["a\u2028b\x0cc\x85d\re", "f\u2029g"]
    (tmp_path / "a.csv").write_text("text,task\ngood,mail\n")
    assert read_rows(tmp_path / "a.csv") == [{"text": "good", "task": "mail"}]
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    assert read_rows(tmp_path / "a.jsonl") == [{"text": "good"}]
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").write_text("[1]\n")
    for name, message in (
        ("a.xml", "'FOLDER/a.xml' has an unknown ending. Give a file of .jsonl, .json, .csv, .tsv, .parquet, .txt."),
        ("none.csv", "'FOLDER/none.csv' is no file. Correct the path; a text that ends so goes into a .txt file."),
        ("b.txt", "'FOLDER/b.txt' is not in UTF-8 ("),
        ("c.jsonl", "FOLDER/c.jsonl, row 1 is [1], but must be an object: column -> value."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FOLDER', str(tmp_path)))}"):
            read_rows(tmp_path / name)
