"""What some examples of an unseen instruction do: in the prompt, as condition, and for a LoRA, fresh or generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from benchmarks.concepts.tasks import digest
from benchmarks.instructions.arms import ARMS, READER, Arm, build, collated, text_encoder
from benchmarks.instructions.data import InstructionData, Row
from benchmarks.instructions.evaluation import TRUE, Amount, Evaluation, Scores, judged
from benchmarks.instructions.runs import answers_of, kept_model
from benchmarks.instructions.tasks import Task
from hyperadapt import LoraGenerator

BY_EXAMPLES, WARM, FRESH, PROMPT = (
    "hyperadapter, by examples",
    "lora from the description",
    "fresh lora",
    "in the prompt",
)
READ = 32
"""Examples that the hyperadapter reads at most."""


@dataclass(frozen=True)
class Shots:
    """How many examples there are, of how many held-out tasks, and the steps and rows that a LoRA is trained on."""

    counts: tuple[int, ...] = (1, 8, 16, 32, 64)
    tasks: int = 12
    steps: int = 30
    rows: int = 8


def condition_of(count: int) -> str:
    """What the scores with so many examples are called."""
    return f"{count} examples"


@dataclass
class ShotRun:
    """One seed of an arm; ``hyperadapter_rate`` is that of the hyperadapter whose descriptions make LoRAs."""

    data: InstructionData
    rate: float
    hyperadapter_rate: float
    seed: int
    amount: Amount
    shots: Shots
    folder: Path

    def measured(self, name: str, role: str) -> dict[str, Any]:
        """The scores with each number of examples, of some tasks of a role."""
        started = time.process_time()
        asked = {PROMPT: self._in_prompt, FRESH: self._fresh, WARM: self._warm, BY_EXAMPLES: self._by_examples}[name]
        tasks = sorted(self.data.tasks[role], key=lambda task: digest(task.name))[: self.shots.tasks]
        counts = [count for count in self.shots.counts if count <= READ or name != BY_EXAMPLES]
        scores: Scores = {condition_of(count): {} for count in counts}
        for task in tasks:
            rows = self.data.rows[role][task.name][: self.data.size.held_out]
            for count in counts:
                exact, losses = asked(task, self.examples(task, count), rows)
                score = (round(float(exact.float().mean()), 4), round(float(losses.mean()), 4))
                scores[condition_of(count)].setdefault(task.kind, {})[task.name] = score
        return {"loss": None, "scores": scores, "cpu_seconds": round(time.process_time() - started, 1)}

    def examples(self, task: Task, count: int) -> list[Row]:
        """Rows of a task with texts of the training; more of them contain the fewer ones of the seed."""
        rows = self.data.rows["train"][task.name]
        order = np.random.default_rng([self.seed, *task.name.encode()]).permutation(len(rows))
        return [rows[place] for place in order[:count]]

    def _in_prompt(self, task: Task, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        arm = ARMS["base model, told"]
        shown = "\n".join(f"{row.text} -> {row.answer}" for row in examples)
        answers = answers_of(self.data.upper, arm, self.data, [])
        # One at a time, since prompts are long.
        parts = [answers([row], [shown]) for row in rows]
        exact, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        return exact, losses

    def _fresh(self, task: Task, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        return self._fitted(self._new_lora(), examples, rows)

    def _warm(self, task: Task, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        model, encode = self._describing
        description = Evaluation(self.data, [], self.amount, self.seed).description(task, TRUE)
        generated = LoraGenerator.from_model(model).from_description(description, text_encoder=encode)
        lora = self._new_lora()
        set_peft_model_state_dict(lora, generated.state_dict())
        return self._fitted(lora, examples, rows)

    def _by_examples(self, task: Task, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        members = [{"row": row} for row in examples]
        embedding = self._reading.embed_examples(members, data_collator=collated(self.data))
        inputs = self.data.batch(rows)
        with torch.no_grad():
            logits = self._reading(**inputs, task_embeddings=embedding.expand(len(rows), -1)).logits
        return judged(logits, inputs["labels"])

    def _new_lora(self) -> PeftModel:
        return build(ARMS["lora"], self.data, [], self.seed)

    def _fitted(self, lora: PeftModel, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Train a LoRA on examples, at a rate that falls to zero, and ask it."""
        steps, generator = self.shots.steps, np.random.default_rng(self.seed)
        optimizer = torch.optim.AdamW(
            [one for one in lora.parameters() if one.requires_grad], self.rate, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        lora.train()
        for _ in range(steps):
            places = generator.permutation(len(examples))[: self.shots.rows]
            lora(**self.data.batch([examples[place] for place in places])).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return answers_of(lora.eval(), ARMS["lora"], self.data, [])(rows, [""] * len(rows))

    @cached_property
    def _describing(self) -> tuple[PeftModel, Callable[[list[str]], Tensor]]:
        arm = ARMS["hyperadapter"]
        encode = text_encoder(arm, self.data, self.data.tasks["train"])
        return self._trained(arm, self.hyperadapter_rate), encode

    @cached_property
    def _reading(self) -> PeftModel:
        return self._trained(READER, self.rate)

    def _trained(self, arm: Arm, rate: float) -> PeftModel:
        tasks = self.data.tasks["train"]
        return kept_model(arm, self.data, tasks, rate, self.seed, self.amount, self.folder)[0]
