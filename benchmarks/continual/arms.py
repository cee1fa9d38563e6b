"""The arms of the continual study: how a model that knows some tasks takes a new one."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from benchmarks.common.fitting import fit
from benchmarks.multitask.data import BATCH_SIZE, MultitaskData
from benchmarks.stability.data import Batch, Row, in_batches, without_tasks
from hyperadapt import HyperAdapterConfig

# As many parameters as the hyperadapter has; and the rank of a LoRA for one task.
SHARED_RANK, OWN_RANK = 32, 8
# What `multitask` chose for both.
START_RATE = 2e-3
# That of ``add_task``, which sets it by itself.
FIT_RATE = 0.2

Logits = dict[int, list[Tensor]]


@dataclass(frozen=True)
class Arm:
    """One way to take a new task.

    Attributes:
        kind: What learned the known tasks: ``"hyperadapter"`` or ``"lora"``.
        replay: Whether half of the rows are of known tasks.
        way: ``"train"`` all of it further; ``"fit"`` an embedding, all else frozen; then train ``"own factors"``
            alone, too; or an ``"own"`` LoRA for the task.
        rates: Learning rates.
    """

    kind: str
    replay: bool = False
    way: str = "train"
    rates: tuple[float, ...] = (START_RATE / 4, START_RATE)


ARMS = {
    "hyperadapter, replay": Arm("hyperadapter", replay=True),
    "hyperadapter, no replay": Arm("hyperadapter"),
    "hyperadapter, exact": Arm("hyperadapter", way="own factors"),
    "hyperadapter, embedding alone": Arm("hyperadapter", way="fit", rates=(FIT_RATE,)),
    "LoRA, replay": Arm("lora", replay=True),
    "LoRA, no replay": Arm("lora"),
    "LoRA, and an own one": Arm("lora", way="own", rates=(START_RATE,)),
}


class Start:
    """What the arms of a seed have in common: models that have learned the known tasks together.

    Args:
        data: Rows of all tasks.
        options: The study's options.
        seed: Of weights and order; it also chooses the new task.
    """

    def __init__(self, data: MultitaskData, options: argparse.Namespace, seed: int) -> None:
        self.data, self.options, self.seed = data, options, seed
        self.new = seed % (len(data.tasks) - 1)
        self.known = [task for task in range(len(data.tasks)) if task != self.new]
        # A hyperadapter counts the new task last.
        self._ids = torch.tensor([*self.known, self.new]).argsort()
        self._models: dict[str, PeftModel] = {}

    def model(self, kind: str) -> PeftModel:
        """A copy of the model that has learned the known tasks, trained when it is first asked for."""
        if kind not in self._models:
            self._models[kind] = model = self.fresh(self._config(kind))
            rows = [row for task in self.known for row in self.data.train[task]]
            steps = self.options.start_steps
            fit(model, self.told(kind, drawn([rows], steps, self.seed)), steps, START_RATE)
        return copy.deepcopy(self._models[kind])

    def fresh(self, config: Any) -> PeftModel:
        """The base model with a new adapter."""
        torch.manual_seed(self.seed)
        return get_peft_model(copy.deepcopy(self.data.base), config)

    def _config(self, kind: str) -> Any:
        if kind == "hyperadapter":
            return HyperAdapterConfig(target_modules="all-linear", tasks=[self.data.tasks[one] for one in self.known])
        return lora(SHARED_RANK)

    @cached_property
    def fitted(self) -> PeftModel:
        """The hyperadapter with the new task, whose embedding is fitted to its rows, all else frozen."""
        model = self.model("hyperadapter")
        rows = [row._asdict() for row in self.data.train[self.new]]
        model.add_task(self.data.tasks[self.new], examples=rows, data_collator=_collate)
        return model

    def told(self, kind: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with the tasks by the ids of a hyperadapter, or without for a LoRA."""
        for batch in batches:
            yield batch | {"tasks": self._ids[batch["tasks"]]} if kind == "hyperadapter" else without_tasks(batch)

    @torch.no_grad()
    def logits(self, model: PeftModel, kind: str, tasks: Sequence[int]) -> Logits:
        """Logits of each task's test batches."""
        return {task: [model(**batch).logits for batch in self.told(kind, self.data.test[task])] for task in tasks}

    def accuracies(self, logits: Logits) -> dict[str, float]:
        """Task -> accuracy."""
        found = {}
        for task, given in logits.items():
            pairs = zip(given, self.data.test[task], strict=True)
            hits = torch.cat([one.argmax(-1) == batch["labels"] for one, batch in pairs])
            found[self.data.tasks[task]] = float(hits.float().mean())
        return found


def lora(rank: int) -> LoraConfig:
    """The configuration of a LoRA on all linear layers."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")


def run_arm(start: Start, arm: Arm, rate: float) -> dict[str, Any]:
    """Take the new task, and measure all tasks before and after.

    Args:
        start: What has learned the known tasks.
        arm: The arm.
        rate: The highest learning rate.

    Returns:
        ``before`` and ``after``, known task -> accuracy; ``new_task`` and ``new``, its accuracy; ``identical``, whether
        the outputs of the known tasks are what they were, bit by bit; ``parameters`` before; and CPU seconds, without
        those of the start and of the fit that the hyperadapter's arms share.
    """
    kind, model = arm.kind, start.model(arm.kind)
    parameters = model.get_nb_trainable_parameters()[0]
    first = start.logits(model, kind, start.known)
    if kind == "hyperadapter":
        # As the command does: the training goes on where the fit ends.
        model = copy.deepcopy(start.fitted)
    started, own = time.process_time(), model
    if arm.way == "own":
        own = start.fresh(lora(OWN_RANK))
    elif arm.way == "own factors":
        model.add_own_factors(model.tasks[-1])
        model.set_trained_task(model.tasks[-1])
    if arm.way != "fit":
        groups = [start.data.train[start.new]]
        if arm.replay:
            groups.append([row for task in start.known for row in start.data.train[task]])
        steps = start.options.steps
        fit(own, start.told(kind, drawn(groups, steps, start.seed)), steps, rate)
    seconds = round(time.process_time() - started, 1)
    last = start.logits(model, kind, start.known)
    same = [torch.equal(a, b) for task in start.known for a, b in zip(first[task], last[task], strict=True)]
    [(name, accuracy)] = start.accuracies(start.logits(own, kind, [start.new])).items()
    return {
        "before": start.accuracies(first),
        "after": start.accuracies(last),
        "new_task": name,
        "new": accuracy,
        "identical": all(same),
        "parameters": parameters,
        "seconds": seconds,
    }


def _collate(rows: Sequence[dict[str, Any]]) -> Batch:
    [batch] = in_batches([Row(**row) for row in rows], len(rows))
    return without_tasks(batch)


def drawn(groups: Sequence[Sequence[Row]], steps: int, seed: int) -> Iterator[Batch]:
    """Random batches with equally many rows of each group, whatever their sizes.

    Args:
        groups: The rows, by group.
        steps: How many batches.
        seed: Of the order.

    Yields:
        Batches.
    """
    random, count = np.random.default_rng(seed), steps * BATCH_SIZE // len(groups)
    rows: list[Row] = []
    for group in groups:
        order = np.concatenate([random.permutation(len(group)) for _ in range(count // len(group) + 1)])[:count]
        rows += [group[place] for place in order]
    yield from in_batches([rows[place] for place in random.permutation(len(rows))], BATCH_SIZE)
