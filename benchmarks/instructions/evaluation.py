"""What the instruction study measures: exact answers and losses, by true descriptions and by wrong ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common.neutral_texts import BLANK, UNRELATED
from benchmarks.instructions.data import MINILM, InstructionData, Row
from benchmarks.instructions.model import IGNORED
from benchmarks.instructions.tasks import Task, trained_wordings

TRUE = "true"
TRAINED = "trained"
NEW_WORDING = "trained, new wording"
WRONG = ("shuffled", "blank", "unrelated", "nearest trained")

# Condition -> kind -> task -> share of exact answers, and mean loss of an answer's token in nats.
Scores = dict[str, dict[str, dict[str, tuple[float, float]]]]
# Of rows with a description each: for each one whether the answer is exact, and its tokens' mean loss.
Answers = Callable[[Sequence[Row], Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Amount:
    """How much is trained and evaluated: steps, their tasks, rows of each; and rows of a held-out task."""

    steps: int
    tasks: int = 16
    rows: int = 1
    held_out: int = 4


class Question(NamedTuple):
    """Rows of a task that are asked by a description."""

    condition: str
    task: Task
    description: str
    rows: list[Row]


@dataclass
class Evaluation:
    """Asks an arm that was trained on some tasks."""

    data: InstructionData
    tasks: Sequence[Task]
    amount: Amount
    seed: int

    def held_out(self, answers: Answers, role: str, conditions: Sequence[str]) -> Scores:
        """Scores of tasks that were never trained, by their true descriptions and by wrong ones."""
        return _scores(answers, [one for task in self.data.tasks[role] for one in self._questions(task, conditions)])

    def trained(self, answers: Answers) -> Scores:
        """Scores of trained tasks on new texts, by a wording that was trained and by one that was not."""
        asked = [
            Question(condition, task, task.wordings[place], self.data.rows["test"][task.name][: self.data.size.trained])
            for task in self.tasks
            for condition, place in ((TRAINED, 0), (NEW_WORDING, -1))
        ]
        return _scores(answers, asked)

    def description(self, task: Task, condition: str) -> str:
        """A description of a task, which is its own one under ``TRUE``."""
        if condition == TRUE:
            return str(self._generator(task).choice(task.wordings))
        if condition == "shuffled":
            # A task that shares an operation with this one is no control.
            apart = [one for one in self.data.tasks[task.role] if not set(one.parts) & set(task.parts)]
            others = [one for one in apart if (one.kind, one.source) == (task.kind, task.source)] or apart
            return self.description(others[self._generator(task).integers(len(others))], TRUE)
        if condition == "nearest trained":
            texts, vectors = self._known
            [own] = self.data.vectors[MINILM]([self.description(task, TRUE)])
            return texts[int((vectors @ own).argmax())]
        return BLANK if condition == "blank" else str(self._generator(task).choice(UNRELATED))

    def _questions(self, task: Task, conditions: Sequence[str]) -> Iterator[Question]:
        rows = self.data.rows[task.role][task.name][: self.amount.held_out]
        for condition in conditions:
            yield Question(condition, task, self.description(task, condition), rows)

    def _generator(self, task: Task) -> np.random.Generator:
        return np.random.default_rng([self.seed, *task.name.encode()])

    @cached_property
    def _known(self) -> tuple[list[str], Tensor]:
        texts = [wording for task in self.tasks for wording in trained_wordings(task)]
        return texts, self.data.vectors[MINILM](texts)


def _scores(answers: Answers, questions: Sequence[Question]) -> Scores:
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    rows = [row for one in questions for row in one.rows]
    counts = [len(one.rows) for one in questions]
    exact, losses = answers(rows, [one.description for one in questions for _ in one.rows])
    for one, right, loss in zip(questions, exact.split(counts), losses.split(counts), strict=True):
        measured = (round(float(right.float().mean()), 4), round(float(loss.mean()), 4))
        scores[one.condition][one.task.kind or TRAINED][one.task.name] = measured
    return {condition: dict(kinds) for condition, kinds in scores.items()}


def judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row ``(batch,)`` whether greedy generation would give its answer, and the mean loss of its tokens.

    It would if each token is the most probable one after the right ones before it. Logits are those of all tokens of
    answers, ``(tokens, vocabulary)``, and labels ``(batch, length)``.
    """
    is_answer = labels[:, 1:] != IGNORED
    targets, counts = labels[:, 1:][is_answer], is_answer.sum(1).tolist()
    right = (logits.argmax(-1) == targets).split(counts)
    losses = cross_entropy(logits.float(), targets, reduction="none").split(counts)
    return torch.stack([one.all() for one in right]), torch.stack([one.mean() for one in losses])


def mean_exact(scores: Scores, condition: str) -> float:
    """Mean share of exact answers over all tasks under a condition."""
    return float(np.mean([score[0] for kind in scores[condition].values() for score in kind.values()]))
