"""One run of the concept study: training on tasks that are drawn anew in each step, and its scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.concepts.arms import Arm, build, text_encoder, trained_wordings
from benchmarks.concepts.data import ConceptData, ConceptTexts, padded
from benchmarks.concepts.evaluation import TRAINED, Amount, Evaluation, Margins, Scores, measured
from benchmarks.concepts.tasks import Task

WARMUP = 0.05
DECAY = 0.25
"""Share of the steps in which the learning rate falls to zero, the last ones."""
WEIGHTS = {"atomic": 3.0, "not": 1.0, "or": 1.0, "versus": 1.0}
"""How often a task of a family is drawn then, in proportion."""
SEPARATE_SHARE = 0.1
"""Steps of one of several LoRAs, as a share of those of an adapter for all tasks."""


class Drawn(NamedTuple):
    """What a step is trained on: for each task one text to say yes to, then for each one to say no to."""

    tasks: list[Task]
    wordings: list[str]
    places: list[int]

    @property
    def labels(self) -> Tensor:
        """``(batch,)``, int64."""
        return torch.tensor([1, 0]).repeat_interleave(len(self.tasks))


def draws(data: ConceptTexts, tasks: Sequence[Task], amount: Amount, seed: int, alone: float) -> Iterator[Drawn]:
    """The steps of a seed, the same for all arms; in a share of them, the first ones, concepts stand alone."""
    generator = np.random.default_rng(seed)
    first = np.array([float(task.family == "atomic") for task in tasks])
    later = np.array([WEIGHTS[task.family] for task in tasks])
    for step in range(amount.steps):
        weights = first if step < alone * amount.steps else later
        is_small = np.count_nonzero(weights) < amount.tasks
        indices = generator.choice(len(tasks), amount.tasks, replace=is_small, p=weights / weights.sum())
        chosen = [tasks[index] for index in indices]
        wordings = [str(generator.choice(trained_wordings(task))) for task in chosen]
        pools = [data.pools(task, "train") for task in chosen]
        drawn = [pool[generator.integers(len(pool))] for pool in pools]
        yes = [int(generator.choice(pool.yes)) for pool in drawn]
        no = [int(generator.choice(pool.no)) for pool in drawn]
        yield Drawn(chosen, wordings, yes + no)


def run_once(
    arm: Arm, data: ConceptData, tasks: Sequence[Task], role: str, rate: float, seed: int, amount: Amount
) -> dict[str, Any]:
    """Train on tasks; evaluate on those of a role and, if that is the test, on the trained ones."""
    started = time.process_time()
    model, losses = trained_model(arm, data, tasks, rate, seed, amount)
    seconds = time.process_time() - started
    margins, evaluation = margins_of(model, arm, data, tasks), Evaluation(data, arm, tasks, amount, seed)
    scores = {} if arm.is_poly else evaluation.held_out(margins, role)
    scores |= evaluation.trained(margins) if role == "test" else {}
    return {
        "parameters": model.get_nb_trainable_parameters()[0],
        "loss": round(fmean(losses[-50:]), 4),
        "train_cpu_seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": scores,
    }


def run_separate(data: ConceptData, tasks: Sequence[Task], rate: float, seed: int, amount: Amount) -> dict[str, Any]:
    """Train a LoRA of its own for each of some trained tasks, and evaluate it on new texts."""
    started = time.process_time()
    amount = replace(amount, steps=max(1, round(SEPARATE_SHARE * amount.steps)))
    found, parameters = {}, 0
    for task in tasks:
        if rows := data.evaluation(task, "test", amount.most(task)):
            model, _ = trained_model(Arm(), data, [task], rate, seed, amount)
            margins = margins_of(model, Arm(), data, [task])(rows[0], "", "")
            found[task.name] = measured(margins, rows[1])
            parameters += model.get_nb_trainable_parameters()[0]
    scores: Scores = {TRAINED: {"atomic": found}}
    return {
        "parameters": parameters,
        "loss": None,
        "train_cpu_seconds": None,
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": scores,
    }


def run_cosine(data: ConceptData, tasks: Sequence[Task], role: str, seed: int, amount: Amount) -> dict[str, Any]:
    """The frozen base model: cosines of text and description, less the threshold that suits trained tasks best."""
    started = time.process_time()
    cosines, answers = [], []
    for task in tasks:
        if task.family == "atomic" and (rows := data.evaluation(task, "train", amount.trained)):
            cosines.append(data.vectors[rows[0]] @ data.described.vectors(task.wordings[:1])[0])
            answers += rows[1]
    threshold = best_threshold(torch.cat(cosines), torch.tensor(answers))

    def margins(places: Sequence[int], adapter: str, head: str) -> Tensor:
        return data.vectors[list(places)] @ data.described.vectors([head])[0] - threshold

    evaluation = Evaluation(data, Arm(), tasks, amount, seed)
    return {
        "parameters": 0,
        "loss": None,
        "train_cpu_seconds": None,
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": evaluation.held_out(margins, role) | evaluation.trained(margins),
    }


def best_threshold(values: Tensor, answers: Tensor) -> float:
    """What values must exceed for a yes to be right most often."""
    order = values.argsort()
    # Of the first k values in order, so many answers are no; of the rest, so many are yes.
    right = torch.cat([torch.zeros(1), (~answers[order]).cumsum(0)])
    right = right + answers.sum() - torch.cat([torch.zeros(1), answers[order].cumsum(0)])
    place = int(right.argmax())
    return float(values[order][place - 1]) if place else -2.0


def trained_model(
    arm: Arm, data: ConceptData, tasks: Sequence[Task], rate: float, seed: int, amount: Amount
) -> tuple[PeftModel, list[float]]:
    """An arm's model in evaluation mode, and the loss of each of its steps."""
    model = build(arm, data, tasks, seed)
    return model, optimised(model, arm, data, tasks, rate, seed, amount)


def optimised(
    model: PeftModel, arm: Arm, data: ConceptData, tasks: Sequence[Task], rate: float, seed: int, amount: Amount
) -> list[float]:
    """Train an arm's model, and leave it in evaluation mode; the loss of each step."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step / amount.steps))
    ids = {task.name: place for place, task in enumerate(tasks)}
    losses = []
    for drawn in draws(data, tasks, amount, seed, arm.alone):
        inputs = inputs_of(arm, data, drawn.places, 2 * drawn.wordings)
        if arm.is_hyperadapter or arm.is_poly:
            told = torch.tensor([ids[task.name] for task in drawn.tasks]).repeat(2)
            inputs["task_ids" if arm.is_poly else "tasks"] = told
        loss = callee(model, arm)(**inputs, labels=drawn.labels, smoothing=arm.smoothing).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def callee(model: PeftModel, arm: Arm) -> Any:
    """What is called with a batch: PeftModel without a task type passes by Poly's own forward, which takes task ids."""
    return model.base_model if arm.is_poly else model


def share_of_rate(done: float) -> float:
    """The share of the learning rate that is left when a share of the steps is done."""
    # Not zero, so that the first step counts.
    return min(1.0, max(0.01, done / WARMUP), (1 - done) / DECAY)


def inputs_of(arm: Arm, data: ConceptData, places: Sequence[int], descriptions: Sequence[str]) -> dict[str, Any]:
    """A batch of texts; with their descriptions, if the arm's head or input has them."""
    if arm.reads:
        return data.read_pairs(places, descriptions)
    inputs: dict[str, Any] = data.padded(places)
    if arm.head == "match" and arm.is_hyperadapter:
        inputs["about"] = data.described.vectors(descriptions)
    elif arm.head == "match":
        unique = list(dict.fromkeys(descriptions))
        about = padded([data.described.states(one) for one in unique])
        rows = torch.tensor([unique.index(one) for one in descriptions])
        inputs |= {"about_states": about["input_ids"], "about_mask": about["attention_mask"], "about_rows": rows}
    return inputs


def margins_of(model: PeftModel, arm: Arm, data: ConceptData, tasks: Sequence[Task]) -> Margins:
    """What asks a trained model."""
    encode = text_encoder(arm, data, tasks)
    ids = {wording: place for place, task in enumerate(tasks) for wording in task.wordings}

    @torch.no_grad()
    def margins(places: Sequence[int], adapter: str, head: str) -> Tensor:
        inputs = inputs_of(arm, data, places, [head] * len(places))
        if arm.is_hyperadapter:
            inputs["task_embeddings"] = model.embed_description(adapter, text_encoder=encode)
        if arm.is_poly:
            inputs["task_ids"] = torch.full((len(places),), ids[adapter])
        logits = callee(model, arm)(**inputs).logits
        return logits[:, 1] - logits[:, 0]

    return margins
