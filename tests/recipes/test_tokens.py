"""Rows become tokens: prompts without loss, chats by their template, truncation, padding, and what cannot be done."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from hyperadapt.recipes.rows import TaskRows
from hyperadapt.recipes.tokens import collator, tokenized
from tests.support.tiny_runs import SPECIAL, WORDS, tokenizer

IDS = {word: index for index, word in enumerate(SPECIAL + WORDS)}


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def dialogue(prompt: Any, completion: Any) -> TaskRows:
    return TaskRows("here", [(prompt, completion)], [], ())


def tokens(prompt: Any, completion: Any, max_length: int = 32) -> tuple[list[int], list[int]]:
    rows = dialogue(prompt, completion)
    [row] = tokenized(rows, tokenizer("CAUSAL_LM"), task_type="CAUSAL_LM", labels=[], max_length=max_length)
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    return row["input_ids"], row["labels"]


def chat(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


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


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_what_has_no_token_is_refused(task_type: str) -> None:
    words = tokenizer(task_type)
    # It adds none of its own.
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    texts = [("a",), (" ",)] if task_type == "SEQ_CLS" else [("a", "yes"), (" ", "yes")]
    what = "text" if task_type == "SEQ_CLS" else "prompt"
    message = f"here, row 2 has a {what} of which the tokenizer makes no token. Fill it in, or drop the row."
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenized(TaskRows("here", texts, ["x"] * 2, ("x",)), words, task_type=task_type, labels=["x"], max_length=9)


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
