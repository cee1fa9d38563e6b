"""Texts that are embedded for several uses: what for, pairs to train on, and how well vectors do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from examples.support.text_tasks import load_task

USES = {
    "query": "Find the passage that answers a question.",
    "document": "A passage that may answer a question.",
    "duplicates": "Find the same question, however it is typed.",
    "kinds": "Group questions by the kind of answer that they ask for.",
    "topics": "Group posts by what they are about.",
}
"""Tasks and their descriptions; a question and its passage are two."""
COLUMNS = {"retrieval": {"question": "query", "passage": "document"}}
"""Tasks of the columns of data sets that are not called after a task."""
DATA = ("retrieval", "duplicates", "kinds", "topics")
NEAREST = 10
CHARACTERS = 200
"""More than the tokens that are kept."""

Vectors = np.ndarray
Encode = Callable[[Sequence[str], str], Vectors]


class Amount(NamedTuple):
    """How much of everything: training rows of a data set, texts to compare with, to choose on, and to report on."""

    train: int
    references: int
    validation: int
    test: int


def mistyped(text: str, generator: np.random.Generator) -> str:
    """A question as it is typed in haste: in small letters, without its mark, two of three longer words misspelt."""
    words = []
    for word in text.lower().rstrip("? ").split():
        if len(word) > 3 and generator.random() < 2 / 3:
            place = int(generator.integers(1, len(word) - 1))
            swap = word[place + 1] + word[place] if generator.random() < 0.5 else word[place + 1]
            word = word[:place] + swap + word[place + 2 :]
        words.append(word)
    return " ".join(words)


@cache
def training_data(amount: Amount, seed: int) -> dict[str, Dataset]:
    """Pairs to train on, in an order, with spelling and with partners that are drawn anew for each seed."""
    generator = np.random.default_rng(seed)
    questions, passages = _retrieval("train")
    rows = generator.permutation(min(len(questions), amount.train))
    texts, _ = _labelled("trec6", "train")
    asked = [texts[row] for row in generator.permutation(min(len(texts), amount.train))]
    return {
        "retrieval": Dataset.from_dict(
            {"question": [questions[row] for row in rows], "passage": [passages[row] for row in rows]}
        ),
        "duplicates": Dataset.from_dict({"question": [mistyped(text, generator) for text in asked], "same": asked}),
        "kinds": _pairs("trec6", amount.train, generator),
        "topics": _pairs("newsgroups20", amount.train, generator),
    }


def scores(encode: Encode, split: str, amount: Amount, data: Sequence[str] = DATA) -> dict[str, float]:
    """By data set: nDCG@10, or the accuracy of a vote of the ten nearest labelled texts."""
    size = amount.test if split == "test" else amount.validation
    found = {}
    for name in data:
        if name == "retrieval":
            questions, passages = _retrieval(split)
            # The other passages are wanted by nobody.
            found[name] = ndcg(encode(questions[:size], "query"), encode(passages[: 2 * size], "document"))
        elif name == "duplicates":
            texts = _labelled("trec6", split)[0][:size]
            generator = np.random.default_rng(0)
            asked = [mistyped(text, generator) for text in texts]
            found[name] = ndcg(encode(asked, name), encode(texts, name))
        else:
            task = {"kinds": "trec6", "topics": "newsgroups20"}[name]
            known, labels = (part[: amount.references] for part in _labelled(task, "train"))
            texts, true = (part[:size] for part in _labelled(task, split))
            found[name] = accuracy(encode(known, name), labels, encode(texts, name), true)
    return found


def ndcg(queries: Vectors, documents: Vectors, at: int = 10) -> float:
    """Mean nDCG@10 where the document of the same place is the only one that is wanted."""
    similar = queries @ documents.T
    ranks = (similar > similar.diagonal()[:, None]).sum(1)
    return float(np.where(ranks < at, 1 / np.log2(ranks + 2), 0).mean())


def accuracy(known: Vectors, labels: Sequence[int], asked: Vectors, true: Sequence[int]) -> float:
    """Share of vectors whose label most of their ten nearest known ones have, weighted by similarity."""
    similar = asked @ known.T
    nearest = np.argpartition(-similar, NEAREST, axis=1)[:, :NEAREST]
    votes = np.zeros((len(asked), max(labels) + 1))
    for row, places in enumerate(nearest):
        np.add.at(votes[row], np.asarray(labels)[places], similar[row, places])
    return float((votes.argmax(1) == np.asarray(true)).mean())


def _retrieval(split: str) -> tuple[list[str], list[str]]:
    """Questions and passages, each passage once and without its title, which often is in the question."""
    rows = getattr(load_task("boolq"), split)
    pairs = {
        passage.partition(" -- ")[2][:CHARACTERS]: question
        for question, passage in zip(rows["text"], rows["text_pair"], strict=True)
    }
    return list(pairs.values()), list(pairs)


def _labelled(task: str, split: str) -> tuple[list[str], list[int]]:
    rows = getattr(load_task(task), split)
    return [text[:CHARACTERS] for text in rows["text"]], list(rows["label"])


def _pairs(task: str, count: int, generator: np.random.Generator) -> Dataset:
    """Pairs of texts, half of them of one class."""
    texts, labels = (part[: 2 * count] for part in _labelled(task, "train"))
    classes = np.asarray(labels)
    rows = []
    for place in generator.choice(len(texts), count):
        is_same = bool(generator.random() < 0.5)
        other = int(generator.choice(np.flatnonzero((classes == classes[place]) == is_same)))
        rows.append({"text": texts[int(place)], "other": texts[other], "score": float(is_same)})
    return Dataset.from_list(rows)
