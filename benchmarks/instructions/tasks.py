"""Instructions: operations on a text, alone and in pairs, in several wordings; and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from benchmarks.concepts.tasks import LAST, digest
from benchmarks.instructions.operations import DONE, FAMILIES, RECORD, SAME, TEXT, Family

KINDS = ("composition", "argument", "operation")
"""What is new in a task that is held out: the pair of two trained operations, an argument, a whole operation."""
FRAMES = ("Write {}.", "Answer with {}.", "Your answer is {}.")
PAIRS = {"train": 25, "validation": 2, "test": 2}
"""Role of an operation -> in so many pairs it stands second, and first; of trained ones, second only."""
NEW = {"validation": 0.05, "test": 0.15}
"""Shares of the pairs of trained operations that are never trained."""


@dataclass(frozen=True)
class Operation:
    """A family with one of its arguments."""

    family: Family
    argument: str

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.family.name} {self.argument}".strip()

    @property
    def role(self) -> str:
        """What it is for, alone or in a pair."""
        return self.family.held_out.get(self.argument, self.family.role)

    def phrase(self, about: str, which: int) -> str:
        """What it asks for, in one of two ways."""
        return self.family.phrases[which].format(about, self.argument)


@dataclass(frozen=True)
class Task:
    """An operation, or one on what another one gives.

    Attributes:
        parts: The operations, in the order in which they are done.
        role: ``"train"``, ``"validation"`` or ``"test"``.
        kind: What is new, one of ``KINDS``; empty for what is trained.
    """

    parts: tuple[Operation, ...]
    role: str
    kind: str

    @property
    def name(self) -> str:
        """Unique."""
        return ", ".join(part.name for part in self.parts)

    @property
    def source(self) -> str:
        """The kind of texts, ``TEXT`` or ``RECORD``."""
        return RECORD if self.parts[0].family.takes == (RECORD,) else TEXT

    @cached_property
    def wordings(self) -> tuple[str, ...]:
        """Descriptions; the last ones are never trained."""
        return tuple(frame.format(self._phrase(which)) for frame in FRAMES for which in (0, 1))

    def answer(self, text: str) -> str | None:
        """What the text makes it answer; None if it is not asked."""
        found: str | None = text
        for part in self.parts:
            found = None if found is None else part.family.apply(found, part.argument)
        return found

    def _phrase(self, which: int) -> str:
        phrase = f"the {self.source}"
        for part in self.parts:
            phrase = part.phrase(phrase, which)
        return phrase


def trained_wordings(task: Task) -> list[str]:
    """The descriptions of a task that take part in training."""
    return list(task.wordings[:-LAST])


def operations() -> list[Operation]:
    """All of them."""
    return [Operation(family, argument) for family in FAMILIES for argument in family.arguments]


def tasks() -> list[Task]:
    """Each operation that texts or records allow, and pairs of them that their names choose."""
    every = operations()
    first = [one for one in every if {TEXT, RECORD} & set(one.family.takes)]
    chosen = {(one,): None for one in first}
    for one in every:
        before = [other for other in first if fits(other, one)]
        after = [other for other in every if fits(one, other)]
        if one.role == "train":
            chosen |= _drawn([(other, one) for other in before if other.role == "train"], PAIRS["train"])
        else:
            chosen |= _drawn([(other, one) for other in before if other.role == "train"], PAIRS[one.role])
            if one in first:
                chosen |= _drawn([(one, other) for other in after if other.role == "train"], PAIRS[one.role])
    return [_task(parts) for parts in chosen]


def subset(trained: Iterable[Task], count: int) -> list[Task]:
    """So many of the trained tasks; a smaller set is part of a larger one."""
    members = sorted(trained, key=lambda task: digest(task.name))
    if count > len(members):
        raise ValueError(f"{count} tasks are more than the {len(members)} trained ones.")
    return members[:count]


def fits(first: Operation, second: Operation) -> bool:
    """Whether the second may follow: it takes what the first gives.

    What asks for words or numbers of a text stands first: "the last word of the text in reverse order" is the first.
    """
    gives = TEXT if first.family.gives == SAME else first.family.gives
    changes_form = second.family.takes != (TEXT,) or second.family.gives == DONE
    return first.family is not second.family and gives in second.family.takes and changes_form


def _drawn(pairs: Iterable[tuple[Operation, ...]], count: int) -> dict[tuple[Operation, ...], None]:
    names = {", ".join(part.name for part in pair): pair for pair in pairs}
    return {names[name]: None for name in sorted(names, key=digest)[:count]}


def _task(parts: tuple[Operation, ...]) -> Task:
    new = [part for part in parts if part.role != "train"]
    if new:
        return Task(parts, new[0].role, "operation" if new[0].family.role != "train" else "argument")
    task = Task(parts, "train", "")
    # Other bits than those that choose pairs.
    place = int(digest(task.name)[-8:], 16) / 16**8
    if len(parts) == 1 or place >= sum(NEW.values()):
        return task
    return Task(parts, "validation" if place < NEW["validation"] else "test", "composition")
