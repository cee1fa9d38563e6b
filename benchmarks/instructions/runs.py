"""One run of the instruction study: training on tasks that are drawn anew in each step, and its scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from benchmarks.concepts.runs import share_of_rate
from benchmarks.concepts.tasks import digest
from benchmarks.instructions.arms import Arm, build, embeddings, text_encoder
from benchmarks.instructions.data import InstructionData, Row, write
from benchmarks.instructions.evaluation import TRUE, WRONG, Amount, Answers, Evaluation, judged
from benchmarks.instructions.tasks import Task, trained_wordings

EVALUATION_BATCH = 48


class Drawn(NamedTuple):
    """What a step is trained on: rows, with the task and the description of each."""

    tasks: list[Task]
    descriptions: list[str]
    rows: list[Row]


def draws(data: InstructionData, tasks: Sequence[Task], amount: Amount, seed: int) -> Iterator[Drawn]:
    """The steps of a seed, the same for all arms; all rows of a task in a step have one description."""
    generator = np.random.default_rng(seed)
    for _ in range(amount.steps):
        places = generator.choice(len(tasks), amount.tasks, replace=len(tasks) < amount.tasks)
        drawn = Drawn([], [], [])
        for task in (tasks[place] for place in places):
            description = str(generator.choice(trained_wordings(task)))
            pool = data.rows["train"][task.name][: data.size.cached]
            for place in generator.choice(len(pool), amount.rows, replace=False):
                drawn.tasks.append(task)
                drawn.descriptions.append(description)
                drawn.rows.append(pool[place])
        yield drawn


def run_once(
    arm: Arm,
    data: InstructionData,
    tasks: Sequence[Task],
    role: str,
    rate: float,
    seed: int,
    amount: Amount,
    folder: Path,
) -> dict[str, Any]:
    """Train on tasks; evaluate on those of a role and, if that is the test, on the trained ones."""
    started = time.process_time()
    amount = replace(amount, steps=amount.steps * arm.lengthened)
    model, losses, seconds = kept_model(arm, data, tasks, rate, seed, amount, folder)
    answers, evaluation = answers_of(model, arm, data, tasks), Evaluation(data, tasks, amount, seed)
    is_test = role == "test"
    scores = evaluation.held_out(answers, role, (TRUE, *WRONG) if is_test and arm.is_hyperadapter else (TRUE,))
    return {
        "parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "loss": round(fmean(losses[-50:]), 4) if losses else None,
        "prompt_tokens": round(prompt_tokens(arm, data, evaluation, role), 2),
        "train_cpu_seconds": round(seconds, 1),
        "scores": scores | (evaluation.trained(answers) if is_test else {}),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def kept_model(
    arm: Arm, data: InstructionData, tasks: Sequence[Task], rate: float, seed: int, amount: Amount, folder: Path
) -> tuple[Any, list[float], float]:
    """An arm's trained model, the losses of its steps and the CPU seconds they took; hyperadapters are written."""
    definition = repr((arm.fields, arm.readers, arm.vectors.__name__, arm.reads, len(tasks), rate, seed, amount))
    path = folder / f"trained_{digest(definition)[:16]}.pt"
    if arm.is_hyperadapter and path.exists():
        model = build(arm, data, tasks, seed)
        kept = torch.load(path)
        set_peft_model_state_dict(model, kept["state"])
        return model.eval(), kept["losses"], kept["seconds"]
    started = time.process_time()
    model, losses = trained_model(arm, data, tasks, rate, seed, amount)
    seconds = time.process_time() - started
    if arm.is_hyperadapter:
        write(path, {"state": get_peft_model_state_dict(model), "losses": losses, "seconds": seconds})
    return model, losses, seconds


def trained_model(
    arm: Arm, data: InstructionData, tasks: Sequence[Task], rate: float, seed: int, amount: Amount
) -> tuple[nn.Module, list[float]]:
    """An arm's model in evaluation mode, and the loss of each of its steps."""
    model = build(arm, data, tasks, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return model.eval(), []
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step / amount.steps))
    ids = {task.name: place for place, task in enumerate(tasks)}
    losses = []
    for drawn in draws(data, tasks, amount, seed):
        inputs = data.batch(drawn.rows, drawn.descriptions if arm.is_told else None)
        if arm.is_hyperadapter:
            inputs["tasks"] = torch.tensor([ids[task.name] for task in drawn.tasks])
        loss = model.train()(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), losses


def answers_of(model: Any, arm: Arm, data: InstructionData, tasks: Sequence[Task]) -> Answers:
    """What asks a trained model."""
    encode = text_encoder(arm, data, tasks) if arm.is_hyperadapter else None

    @torch.no_grad()
    def answers(rows: Sequence[Row], descriptions: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(rows), EVALUATION_BATCH):
            members, told = rows[start : start + EVALUATION_BATCH], descriptions[start : start + EVALUATION_BATCH]
            # What was never trained ends its lines, as examples in a prompt do.
            inputs = data.batch(members, told if arm.is_told else None, arm.adapter == "none")
            if encode is not None:
                inputs["task_embeddings"] = embeddings(model, encode, told)
            parts.append(judged(model(**inputs).logits, inputs["labels"]))
        exact, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        return exact, losses

    return answers


def prompt_tokens(arm: Arm, data: InstructionData, evaluation: Evaluation, role: str) -> float:
    """Mean number of a prompt's tokens, over the held-out tasks."""
    return fmean(
        data.tokens(*row, evaluation.description(task, TRUE) if arm.is_told else None).start
        for task in data.tasks[role]
        for row in data.rows[role][task.name][:1]
    )
