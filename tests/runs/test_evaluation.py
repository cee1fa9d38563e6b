"""Scores of classes and of completions against ones made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from hyperadapt.runs.evaluation import (
    Answers,
    class_answers,
    completion_answers,
    generated,
    is_no_better,
    no_better_lines,
)
from tests.support.tiny_runs import SPECIAL, WORDS, tokenizer

IDS = {word: index for index, word in enumerate(SPECIAL + WORDS)}


class LookedUp(nn.Module):
    """Logits looked up by a row's second token; generates each prompt's last token, and then the end."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.device = torch.device("cpu")
        self.batches: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, tasks: str, **batch: Tensor) -> Any:
        self.batches.append({"input_ids": input_ids, "tasks": tasks, **batch})
        return SimpleNamespace(logits=self.table[input_ids[:, 1]])


class Echo(LookedUp):
    # Tokens that it can read.
    positions: int | None = None

    @property
    def config(self) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=self.positions))

    def forward(self, input_ids: Tensor, tasks: str, **batch: Tensor) -> Any:
        self.batches.append({"input_ids": input_ids, "tasks": tasks, **batch})
        return {"logits": self.table[input_ids]}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        self.batches.append({"input_ids": input_ids, "attention_mask": attention_mask, **options})
        assert self.positions is None or input_ids.shape[1] + max_new_tokens <= self.positions
        answer = torch.full((len(input_ids), max_new_tokens), options["eos_token_id"])
        answer[:, 0] = input_ids[:, -1]
        return torch.cat([input_ids, answer], 1)


def test_classes_compete_within_their_task() -> None:
    logits = torch.zeros(len(IDS), 4)
    # Class 3 belongs to another task and is always the highest.
    logits[:, 3] = 9.0
    logits[IDS["a"], 2], logits[IDS["b"], 0] = 1.0, 2.0
    model = LookedUp(logits)
    words = ["a", "b", "b", "a", "b"]
    rows = [{"input_ids": [2, IDS[word], *[3] * (5 - place)]} for place, word in enumerate(words)]
    dataset = Dataset.from_list([row | {"labels": label} for row, label in zip(rows, [2, 0, 2, 2, 2], strict=True)])
    seen: list[int] = []
    asked = {"tasks": "one"}
    answers = class_answers(model, tokenizer("SEQ_CLS"), dataset, asked, [2, 0], batch_size=2, progress=seen.append)
    scores = answers.scores
    own = logits[:, [2, 0]][[IDS[word] for word in words]]
    assert scores["loss"] == pytest.approx(float(cross_entropy(own, torch.tensor([0, 1, 0, 0, 0]))))
    assert scores | {"loss": 0} == {"accuracy": 3 / 5, "loss": 0, "rows": 5, "majority": 4 / 5}
    # The shortest comes first.
    assert answers.right == [False, True, False, True, True]
    assert seen == [2, 2, 1]
    assert [batch["input_ids"].shape for batch in model.batches] == [(2, 4), (2, 6), (1, 7)]
    assert {batch["tasks"] for batch in model.batches} == {"one"}


def dialogues(rows: Sequence[tuple[str, str]]) -> Dataset:
    tokens = [([IDS[word] for word in prompt.split()], [IDS[word] for word in end.split()]) for prompt, end in rows]
    return Dataset.from_list(
        [
            {
                "input_ids": prompt + end,
                "attention_mask": [1] * len(prompt + end),
                "labels": [-100] * len(prompt) + end,
            }
            for prompt, end in tokens
        ]
    )


def test_completions_are_compared_to_the_letter() -> None:
    words = tokenizer("CAUSAL_LM")
    words.pad_token = words.eos_token
    # The next token is the same as the last, with some probability.
    model = Echo(one_hot(torch.arange(len(IDS)), len(IDS)).float() * 3)
    rows = [("<s> a", "a </s>"), ("<s> a b c", "b </s>"), ("<s> a yes", "yes yes </s>"), ("<s> b", "a </s>")]
    seen: list[int] = []
    scores = completion_answers(
        model, words, dialogues(rows), {"tasks": "one"}, batch_size=3, progress=seen.append
    ).scores
    assert scores["accuracy"] == 1 / 4
    assert (scores["rows"], scores["majority"], seen) == (4, 1 / 2, [3, 1])
    same, other = (-log_softmax(torch.tensor([3.0] + [0.0] * (len(IDS) - 1)), 0))[:2].tolist()
    # Tokens that repeat the one before: a; -; yes, yes; -. The others: </s>; b, </s>; </s>; a, </s>.
    assert math.isclose(scores["loss"], (3 * same + 6 * other) / 9, rel_tol=1e-5)
    prompts = model.batches[1]
    assert prompts["input_ids"].tolist() == [
        [IDS[word] for word in text.split()] for text in ("</s> </s> <s> a", "</s> </s> <s> b", "<s> a b c")
    ]
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert prompts["tasks"] == "one"


def test_no_more_is_generated_than_a_model_can_read() -> None:
    words = tokenizer("CAUSAL_LM")
    words.pad_token = words.eos_token
    model = Echo(one_hot(torch.arange(len(IDS)), len(IDS)).float() * 3)
    model.positions = 6
    # Each fits; the second one's prompt and the first one's completion do not.
    rows = dialogues([("<s> a", "a a b </s>"), ("<s> b c d e", "</s>"), ("<s> b", "b </s>")])
    scores = completion_answers(model, words, rows, {"tasks": "one"}, batch_size=3, progress=str)
    # The shortest row comes first.
    assert (scores.right, scores.places) == ([True, False, False], [2, 0, 1])
    sizes = [tuple(batch["input_ids"].shape) for batch in model.batches if "eos_token_id" in batch]
    assert sizes == [(1, 2), (1, 2), (1, 5)]

    prompts = [[4, IDS["a"]], [4, *map(IDS.__getitem__, "bcd")]]
    assert generated(model, words, prompts, {"tasks": "one"}, [9, 9]) == ["a", "d"]
    long = [4, *map(IDS.__getitem__, "abcdef")]
    assert generated(model, words, [prompts[0], long], {"tasks": "one"}, [1, 1]) == ["a", "f"]
    assert model.batches[-1]["input_ids"].tolist() == [long[-5:]]


@pytest.mark.parametrize(
    ("right", "majority", "expected"),
    [
        ([True, False, False, False], 0.5, True),
        ([True, True, False, False], 0.5, True),
        ([True, True, True, False], 0.5, False),
        # All rows have one answer, or each has its own.
        ([True, True, True, True], 1.0, False),
        ([False, False, False, False], 0.25, False),
    ],
)
def test_what_always_giving_one_answer_would_reach(right: list[bool], majority: float, expected: bool) -> None:
    scores = Answers(right, 1.0, majority).scores
    assert is_no_better(scores) == expected
    lines = no_better_lines({"tasks": {"one": scores}, "no_better_than_majority": ["one"] if expected else []})
    text = f"one: an accuracy of {sum(right) / 4:.3f} is no better than always giving its most frequent answer (0.500)"
    assert lines == ([text] if expected else [])
