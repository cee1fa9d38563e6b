"""Rows become tokens: labels by name, prompts without loss, truncation, padding, and errors that name the row."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hyperadapt.recipes import Recipe, TaskRecipe
from hyperadapt.recipes.columns import Columns
from hyperadapt.recipes.rows import TaskRows, checked_rows, collator, drawn, read_rows, tokenized
from tests.support.tiny_runs import SPECIAL, WORDS, tokenizer, write_rows

IDS = {word: index for index, word in enumerate(SPECIAL + WORDS)}


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def labelled(given: list[Any], *, names: list[str] | None = None, is_text: bool = False, **task: Any) -> TaskRows:
    values = {"text": ["a"] * len(given), "label": given}
    columns = Columns("here", values, {"label": names} if names else {}, is_text)
    return checked_rows(columns, TaskRecipe(**task), "SEQ_CLS")


def dialogue(prompt: Any, completion: Any) -> TaskRows:
    columns = Columns("here", {"prompt": [prompt], "completion": [completion]}, {})
    return checked_rows(columns, TaskRecipe(), "CAUSAL_LM")


def tokens(prompt: Any, completion: Any, max_length: int = 32) -> tuple[list[int], list[int]]:
    rows = dialogue(prompt, completion)
    [row] = tokenized(rows, tokenizer("CAUSAL_LM"), task_type="CAUSAL_LM", labels=[], max_length=max_length)
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    return row["input_ids"], row["labels"]


def chat(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


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
    assert drawn(rows, 12) is drawn(rows, None) is rows


def test_texts_are_tokenised() -> None:
    rows = TaskRows("here", [("a b",), ("c d e f g",)], ["y", "x"], ("y", "x"))
    dataset = tokenized(rows, tokenizer("SEQ_CLS"), task_type="SEQ_CLS", labels=["z", "x", "y"], max_length=5)
    assert dataset["input_ids"][:] == [ids("[CLS] a b [SEP]"), ids("[CLS] c d e [SEP]")]
    assert dataset["labels"][:] == [2, 1]
    batch = collator(tokenizer("SEQ_CLS"), "SEQ_CLS")(dataset.to_list())
    assert batch["input_ids"].tolist() == [ids("[CLS] a b [SEP] [PAD]"), ids("[CLS] c d e [SEP]")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [2, 1]


def test_pairs_are_tokenised() -> None:
    rows = TaskRows("here", [("a", "b c")], ["x"], ("x",))
    [row] = tokenized(rows, tokenizer("SEQ_CLS"), task_type="SEQ_CLS", labels=["x"], max_length=8)
    assert row["input_ids"] == ids("[CLS] a [SEP] b c [SEP]")
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_only_the_completion_has_labels() -> None:
    assert tokens("a b", "yes no") == (ids("<s> a b yes no </s>"), [-100] * 3 + ids("yes no </s>"))
    assert tokens("a b", "yes </s>") == (ids("<s> a b yes </s>"), [-100] * 3 + ids("yes </s>"))


def test_prompts_lose_their_beginning_but_for_the_first_token() -> None:
    start = "<s> d e"
    assert tokens("a b c d e", "yes", 5) == (ids(f"{start} yes </s>"), [-100] * 3 + ids("yes </s>"))
    assert tokens("a b c d e", "yes", 3)[0] == ids("<s> yes </s>")
    # The model's own limit of 32 counts as well.
    assert len(tokens("a " * 50, "yes", 100)[0]) == 32


def test_chats_follow_the_template() -> None:
    prompt = chat("system", "a") + chat("user", "b c")
    expected = [
        *(IDS["[UNK]"], *ids("a </s> user: b c </s> assistant:")),
        *ids("yes </s>"),
    ]
    for completion in (chat("assistant", "yes"), "yes"):
        found, labels = tokens(prompt, completion)
        assert found == expected
        assert labels == [-100] * 8 + ids("yes </s>")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (5, "yes", "here, row 1 has the prompt 5, but needs a text or a list of messages"),
        ("a", [], "here, row 1 has the completion [], but needs a text or a list of messages"),
        ([{"role": "user"}], "yes", "here, row 1 has the prompt [{'role': 'user'}], but needs"),
        ("a", chat("assistant", "yes"), "here, row 1 has a text as prompt, but messages as completion."),
        ("a", "", "here, row 1 has an empty prompt or completion."),
        ("", "a", "here, row 1 has an empty prompt or completion."),
    ],
)
def test_dialogues_that_are_wrong(prompt: Any, completion: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dialogue(prompt, completion)


def test_what_the_tokenizer_cannot_do_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"here, row 1 has a completion of 3 tokens, which leaves no room .*max_length=3"
    ):
        tokens("a b", "yes no", 3)
    changes = {
        "chat_template": (None, "here, row 1 holds messages, but the tokenizer has no chat template."),
        "eos_token": (None, "here, row 1: the tokenizer has no end-of-sequence token"),
    }
    rows = dialogue(chat("user", "a"), "yes")
    for name, (value, message) in changes.items():
        changed = tokenizer("CAUSAL_LM")
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            tokenized(rows, changed, task_type="CAUSAL_LM", labels=[], max_length=9)
    changed = tokenizer("CAUSAL_LM")
    changed.chat_template = "{{ messages | length }} {% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="row 1: the tokenizer's chat template writes the prompt in another way"):
        tokenized(rows, changed, task_type="CAUSAL_LM", labels=[], max_length=9)


def test_batches_of_dialogues_are_padded() -> None:
    words = tokenizer("CAUSAL_LM")
    words.pad_token = words.eos_token
    rows = [
        tokenized(dialogue(prompt, "yes"), words, task_type="CAUSAL_LM", labels=[], max_length=9)[0]
        for prompt in ("a", "a b")
    ]
    batch = collator(words, "CAUSAL_LM")(rows)
    assert batch["input_ids"].tolist() == [ids("<s> a yes </s> </s>"), ids("<s> a b yes </s>")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    # The padding has no label, though it is the token that ends an answer.
    assert batch["labels"].tolist() == [[-100, -100, *ids("yes </s>"), -100], [-100] * 3 + ids("yes </s>")]
