"""What the demo has to know beside its adapter: the concepts to choose from, and how often answers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

_FILE = "demo.json"


class Concept(NamedTuple):
    """A task of the bank; its name starts with the corpus."""

    name: str
    description: str
    is_trained: bool

    @property
    def corpus(self) -> str:
        """Where its texts come from."""
        return self.name.partition("/")[0]


class Score(NamedTuple):
    """Share of right answers, a mean over so many concepts: asked by their own description, and by another one."""

    concepts: int
    own: float
    other: float

    def __str__(self) -> str:
        return f"{self.own:.0%} right by their own description, {self.other:.0%} by another one ({self.concepts})"


class Facts(NamedTuple):
    """All of it; scores are None before they are measured."""

    max_length: int
    concepts: list[Concept]
    unseen: Score | None
    trained: Score | None

    def save(self, folder: Path) -> None:
        """Write it beside the adapter."""
        (folder / _FILE).write_text(json.dumps(self, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Facts:
        """Read it again."""
        max_length, concepts, unseen, trained = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        scores = [None if score is None else Score(*score) for score in (unseen, trained)]
        return cls(max_length, [Concept(*concept) for concept in concepts], *scores)
