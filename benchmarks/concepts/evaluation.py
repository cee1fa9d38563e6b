"""What the concept study measures: accuracy and area under the curve, by true descriptions and by wrong ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.common.neutral_texts import BLANK, UNRELATED
from benchmarks.concepts.arms import Arm, trained_wordings
from benchmarks.concepts.data import ConceptData
from benchmarks.concepts.tasks import Task

TRUE = "true"
TRAINED = "trained"
NEW_WORDING = "trained, new wording"
SHUFFLED_ADAPTER = "shuffled for the adapter"

# Condition -> family -> task -> accuracy and area under the curve.
Scores = dict[str, dict[str, dict[str, tuple[float, float]]]]
# Places of texts, the description for the adapter, and that for the head or the input -> logit of yes less that of no.
Margins = Callable[[Sequence[int], str, str], Tensor]


@dataclass(frozen=True)
class Amount:
    """How much is trained and evaluated: steps, tasks of a batch, and texts of either answer, by family."""

    steps: int
    tasks: int = 16
    atomic: int = 16
    others: int = 6
    trained: int = 4

    def most(self, task: Task) -> int:
        """Texts of either answer to evaluate a task on."""
        if task.role == "train":
            return self.trained
        return self.atomic if task.family == "atomic" else self.others


@dataclass
class Evaluation:
    """Asks an arm that was trained on some tasks."""

    data: ConceptData
    arm: Arm
    tasks: Sequence[Task]
    amount: Amount
    seed: int

    def held_out(self, margins: Margins, role: str) -> Scores:
        """Scores of tasks that were never trained; on validation by their true descriptions alone."""
        scores: Scores = defaultdict(lambda: defaultdict(dict))
        for task in self.data.tasks[role]:
            if rows := self.data.evaluation(task, role, self.amount.most(task)):
                conditions = self.wrong(task) if role == "test" else {}
                for condition, (adapter, head) in {TRUE: self.true(task), **conditions}.items():
                    scores[condition][task.family][task.name] = measured(margins(rows[0], adapter, head), rows[1])
        return {condition: dict(families) for condition, families in scores.items()}

    def trained(self, margins: Margins) -> Scores:
        """Scores of trained atomic tasks on new texts, by a wording that was trained and by one that was not."""
        scores: Scores = {TRAINED: {"atomic": {}}, NEW_WORDING: {"atomic": {}}}
        for task in self.tasks:
            if task.family == "atomic" and (rows := self.data.evaluation(task, "test", self.amount.most(task))):
                for condition, wording in {TRAINED: task.wordings[0], NEW_WORDING: task.wordings[-1]}.items():
                    scores[condition]["atomic"][task.name] = measured(margins(rows[0], wording, wording), rows[1])
        return scores

    def true(self, task: Task) -> tuple[str, str]:
        """A task's own description, for the adapter and for the head or the input."""
        return self._wording(task), self._wording(task)

    def wrong(self, task: Task) -> dict[str, tuple[str, str]]:
        """Condition -> descriptions likewise, of which that of the adapter is not the task's own."""
        if not self.arm.is_hyperadapter:
            return {}
        (true, _), generator = self.true(task), self._generator(task)
        others = [one for one in self.data.tasks[task.role] if one.family == task.family]
        # A pair that shares a concept with this one is no control.
        others = [one for one in others if not set(one.parts) & set(task.parts)]
        near = [one for one in others if one.corpus == task.corpus]
        far = [one for one in others if one.corpus != task.corpus]
        shuffled = self._wording((near or far)[generator.integers(len(near or far))])
        if self.arm.head == "match":
            return {SHUFFLED_ADAPTER: (shuffled, true)}
        wrong = {"shuffled": shuffled}
        if task.family == "atomic":
            wrong |= {
                "across corpora": self._wording(far[generator.integers(len(far))]),
                "blank": BLANK,
                "unrelated": UNRELATED[generator.integers(len(UNRELATED))],
                "nearest trained": self._nearest(true),
            }
        return {name: (text, text) for name, text in wrong.items()}

    def _wording(self, task: Task) -> str:
        return str(self._generator(task).choice(task.wordings))

    def _generator(self, task: Task) -> np.random.Generator:
        return np.random.default_rng([self.seed, *task.name.encode()])

    @cached_property
    def _known(self) -> tuple[list[str], Tensor]:
        texts = [wording for task in self.tasks for wording in trained_wordings(task)]
        return texts, self.data.described.vectors(texts)

    def _nearest(self, description: str) -> str:
        """The trained description whose vector is closest."""
        texts, vectors = self._known
        return texts[int((vectors @ self.data.described.vectors([description])[0]).argmax())]


def measured(margins: Tensor, answers: Sequence[bool]) -> tuple[float, float]:
    """Accuracy and area under the curve."""
    accuracy = float(((margins > 0) == torch.tensor(answers)).float().mean())
    return round(accuracy, 4), round(float(roc_auc_score(answers, margins.float())), 4)


def mean_scores(scores: Scores, condition: str, family: str = "atomic") -> tuple[float, float]:
    """Mean accuracy and area over the tasks of a family."""
    accuracy, area = np.mean(list(scores[condition][family].values()), axis=0)
    return float(accuracy), float(area)
