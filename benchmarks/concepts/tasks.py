"""Yes/no tasks made of concepts: each alone, NOT, OR, and one rather than another; and which of them are trained."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.concepts.bank import CLASSES, SENTENCES, Sentences
from benchmarks.concepts.predicates import PREDICATES

ROLES = ("train", "validation", "test")
FAMILIES = ("atomic", "not", "or", "versus")
HELD_OUT = {
    "questions": (4, 9),
    "newswire": (3, 7),
    "posts": (3, 5),
    "exams": (3, 5),
    "articles": (0, 2),
    "predicates": (3, 6),
}
"""Corpus -> how many whole concepts are for validation and for the test, and never trained."""
CORPORA = tuple(HELD_OUT)
"""All of them; predicates are of the texts of all others."""
LEAST_TEXTS = 20
"""Texts that a class must have to be held out."""
LAST = 2
"""Of a trained task's wordings, so many are never trained: those of the last sentence."""


@dataclass(frozen=True)
class Concept:
    """What a text can be or have; its name starts with the corpus."""

    name: str
    corpus: str
    phrases: tuple[str, str]
    role: str


@dataclass(frozen=True)
class Task:
    """One question about a text.

    Attributes:
        name: Unique; starts with the corpus.
        family: One of ``FAMILIES``.
        corpus: Of its texts; ``"predicates"`` takes those of all.
        parts: The one or two concepts.
        wordings: Descriptions, those that are never trained at the end.
        role: That of its concepts, one of ``ROLES``.
    """

    name: str
    family: str
    corpus: str
    parts: tuple[str, ...]
    wordings: tuple[str, ...]
    role: str

    def answer(self, tags: Collection[str]) -> bool | None:
        """Whether a text with these concepts is one; None if it is not asked about."""
        has = [part in tags for part in self.parts]
        if self.family == "versus":
            return None if has[0] == has[1] else has[0]
        return any(has) != (self.family == "not")


def concepts(corpora: Sequence[str], counts: Counter[str]) -> list[Concept]:
    """The concepts of some corpora with their roles, which only names decide; counts are those of a class's texts."""
    members: dict[str, dict[str, tuple[str, str]]] = {
        **CLASSES,
        "predicates": {name: predicate.phrases for name, predicate in PREDICATES.items()},
    }
    bank = []
    for corpus in corpora:
        phrases = members[corpus]
        names = {name: f"{corpus}/{name}" for name in phrases if corpus == "predicates" or counts[f"{corpus}/{name}"]}
        enough = [name for name in names.values() if corpus == "predicates" or counts[name] >= LEAST_TEXTS]
        validation, test = HELD_OUT[corpus]
        held_out = sorted(enough, key=digest)[: validation + test]
        roles = dict.fromkeys(held_out[:test], "test") | dict.fromkeys(held_out[test:], "validation")
        bank += [Concept(full, corpus, phrases[name], roles.get(full, "train")) for name, full in names.items()]
    return bank


def digest(text: str) -> str:
    """What orders texts and names in a fixed way that has nothing to do with what they say."""
    return hashlib.sha256(text.encode()).hexdigest()


def subset(bank: Sequence[Concept], count: int) -> list[Concept]:
    """So many of the trained concepts; a smaller set is part of a larger one."""
    trained = sorted((concept for concept in bank if concept.role == "train"), key=lambda one: digest(one.name))
    if count > len(trained):
        raise ValueError(f"{count} concepts are more than the {len(trained)} trained ones.")
    return trained[:count]


def tasks_of(bank: Iterable[Concept]) -> list[Task]:
    """Each concept's task, its contrary, and two pairs of each with its neighbours in a random circle of its corpus."""
    groups: dict[tuple[str, str], list[Concept]] = defaultdict(list)
    for concept in bank:
        groups[concept.corpus, concept.role].append(concept)
    tasks: dict[str, Task] = {}
    for (corpus, role), members in groups.items():
        sentences = SENTENCES[corpus]
        for one in members:
            tasks[one.name] = Task(one.name, "atomic", corpus, (one.name,), _wordings(sentences, one.phrases), role)
            name = f"{corpus}/not {_short(one)}"
            wordings = _wordings(sentences, one.phrases, contrary=True)
            tasks[name] = Task(name, "not", corpus, (one.name,), wordings, role)
        generator = np.random.default_rng(len(members))
        for family, word in (("or", "or"), ("versus", "rather than")) if len(members) > 1 else ():
            circle = [members[index] for index in generator.permutation(len(members))]
            for one, other in zip(circle, circle[1:] + circle[:1], strict=True):
                # Of two members only, "or" would come twice.
                if family == "or" and one.name > other.name and len(members) == 2:
                    continue
                name = f"{corpus}/{_short(one)} {word} {_short(other)}"
                pairs = zip(one.phrases, other.phrases, strict=True)
                first, second = (f"{phrase} {word} {second}" for phrase, second in pairs)
                wordings = _wordings(sentences, (first, second))
                tasks[name] = Task(name, family, corpus, (one.name, other.name), wordings, role)
    return list(tasks.values())


def _short(concept: Concept) -> str:
    return concept.name.partition("/")[2]


def _wordings(sentences: Sentences, phrases: tuple[str, str], contrary: bool = False) -> tuple[str, ...]:
    chosen = sentences.negative if contrary else sentences.positive
    return tuple(sentence.format(phrase) for sentence in chosen for phrase in phrases)
