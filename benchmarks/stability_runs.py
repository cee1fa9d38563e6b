"""One run of the stability study: its data, training, and what is measured."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from benchmarks.stability_arms import Arm, build
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import LabelMatcher, load_matcher
from examples.support.text_tasks import load_task
from hyperadapt.trainer import TASK_COLUMN, TaskCollator, TaskSampler, concatenate_tasks

TASKS = ("trec6", "sms_spam", "product_sent", "movie_sent", "stereoset_rel")
MAX_LENGTH = 16
ROWS = 1000
BATCH_SIZE = 16
FROZEN_LAYERS = 3
"""Lower layers without adapters. They are computed once for all runs, which halves the time."""
WARMUP = 0.05
WINDOW = 10
TARGET_LOSS = 0.6

Batch = dict[str, Tensor]


class StabilityData:
    """Rows and base model of all runs.

    Args:
        validation_rows: Validation rows per task.

    Attributes:
        base: The base model, its encoder in bfloat16.
        validation: Validation batches.
        base_loss: The base model's mean validation loss, in nats.
        base_accuracy: Its accuracy there.
    """

    def __init__(self, validation_rows: int) -> None:
        tasks, self._tokenizer = [load_task(name) for name in TASKS], load_tokenizer()
        settings = {"tokenizer": self._tokenizer, "max_length": MAX_LENGTH}
        train = encode(tasks, "train", max_rows=ROWS, **settings)
        named = {name: rows.remove_columns(TASK_COLUMN) for name, rows in zip(TASKS, train, strict=True)}
        self._train = concatenate_tasks(named, TASKS)
        validation = encode(tasks, "validation", max_rows=validation_rows, **settings)
        self.base = load_matcher(tasks, self._tokenizer, torch.bfloat16)
        self._lower = split_encoder(self.base)
        self.validation = [self._computed(batch) for rows in validation for batch in batches(rows, self._tokenizer)]
        self.base_loss, self.base_accuracy = evaluate(self.base, self.validation, takes_tasks=False)

    def training_batches(self, steps: int, seed: int) -> list[Batch]:
        """The first batches of a seed; the tasks have equal shares.

        Args:
            steps: How many, at most an epoch.
            seed: Of their order.

        Returns:
            Batches with ``tasks``.
        """
        sampler = TaskSampler(self._train[TASK_COLUMN], BATCH_SIZE, seed=seed)
        collate = TaskCollator(DataCollatorWithPadding(self._tokenizer))
        loader = DataLoader(self._train, BATCH_SIZE, sampler=sampler, collate_fn=collate)
        return [self._computed(batch) for batch in itertools.islice(loader, steps)]

    @torch.no_grad()
    def _computed(self, batch: Batch) -> Batch:
        """A batch with the lower layers' output in place of its tokens."""
        attention_mask = batch["attention_mask"]
        states = self._lower(batch["input_ids"], attention_mask, batch["token_type_ids"]).last_hidden_state
        return {
            "input_ids": states,
            "attention_mask": attention_mask,
            "labels": batch["labels"],
            TASK_COLUMN: batch[TASK_COLUMN],
        }


class GivenStates(nn.Module):
    """In the place of an encoder's embeddings, where its input are the states of lower layers."""

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        """Pass the states on.

        Args:
            input_ids: The states, shape ``(batch, length, hidden_size)``.
            **others: What embeddings are given, too.

        Returns:
            The states.
        """
        return input_ids


def split_encoder(model: LabelMatcher) -> nn.Module:
    """Take the lower layers off a model, and its dropout.

    Args:
        model: The model; its ``input_ids`` are then the lower layers' output.

    Returns:
        The lower layers, an encoder.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # On a CPU the backward of fused attention in bfloat16 takes longer than all else together.
    model.set_attn_implementation("eager")
    lower = copy.deepcopy(model.bert)
    lower.encoder.layer = lower.encoder.layer[:FROZEN_LAYERS]
    model.bert.encoder.layer = model.bert.encoder.layer[FROZEN_LAYERS:]
    model.bert.embeddings = GivenStates()
    return lower


def run_once(arm: Arm, data: StabilityData, training: Sequence[Batch], rate: float, seed: int) -> dict[str, Any]:
    """Train and validate once.

    Args:
        arm: The arm.
        data: The data.
        training: A batch for each step.
        rate: The highest learning rate.
        seed: Of the adapter's weights.

    Returns:
        What was measured, None where it is not finite: accuracy, losses in nats, largest norm of the gradient before
        clipping, and so on.
    """
    started = time.perf_counter()
    model = build(arm, data.base, TASKS, seed)
    losses, gradients, failure = train(model, arm, training, rate)
    loss, accuracy = math.nan, math.nan
    if failure is None:
        loss, accuracy = evaluate(model, data.validation, takes_tasks=arm.config is not None)
        failure = None if math.isfinite(loss) else "validation loss"
    values = {
        "accuracy": accuracy if failure is None else math.nan,
        "loss": loss,
        "base_accuracy": data.base_accuracy,
        "base_loss": data.base_loss,
        **summarize(losses),
        "largest_gradient": max(filter(math.isfinite, gradients), default=math.nan),
    }
    return {
        **{name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in values.items()},
        "steps_to_loss": steps_to(losses, TARGET_LOSS),
        "spikes": count_spikes(losses),
        "failure": failure,
        "failed_step": len(losses) if failure else None,
        "diverged": failure is not None or loss > data.base_loss,
        "parameters": model.get_nb_trainable_parameters()[0],
        "seconds": round(time.perf_counter() - started, 2),
    }


def train(
    model: PeftModel, arm: Arm, training: Sequence[Batch], rate: float
) -> tuple[list[float], list[float], str | None]:
    """Train until the end, or until something is not finite.

    Args:
        model: The model; is left in evaluation mode.
        arm: The arm.
        training: A batch for each step.
        rate: The highest learning rate.

    Returns:
        The losses and the gradients' norms before clipping, of each step, and what failed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP * len(training)))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(training))
    losses: list[float] = []
    gradients: list[float] = []
    model.train()
    for batch in training:
        try:
            loss = model(**batch if arm.config is not None else without_tasks(batch)).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return losses, gradients, "loss"
            loss.backward()
        except torch.linalg.LinAlgError as error:
            return losses, gradients, f"decomposition: {error}".splitlines()[0]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        gradients.append(float(norm))
        if not math.isfinite(gradients[-1]):
            return losses, gradients, "gradient"
        if arm.clip:
            nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return losses, gradients, None


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], *, takes_tasks: bool) -> tuple[float, float]:
    """Mean loss and accuracy.

    Args:
        model: The model, in evaluation mode.
        batches: Batches with ``tasks``.
        takes_tasks: Whether the model is told the tasks.

    Returns:
        The loss in nats, and the accuracy.
    """
    losses, hits = [], []
    for batch in batches:
        output = model(**batch if takes_tasks else without_tasks(batch))
        losses.append(float(output.loss) * len(batch["labels"]))
        hits.append(output.logits.argmax(-1) == batch["labels"])
    correct = torch.cat(hits)
    return sum(losses) / len(correct), float(correct.float().mean())


def without_tasks(batch: Batch) -> Batch:
    """A batch for a model that knows no tasks.

    Args:
        batch: The batch.

    Returns:
        Its other columns.
    """
    return {name: column for name, column in batch.items() if name != TASK_COLUMN}


def summarize(losses: Sequence[float]) -> dict[str, float]:
    """First loss, mean of the last ten, and largest finite one.

    Args:
        losses: Of each step.

    Returns:
        By name; NaN where there is none.
    """
    return {
        "train_start": losses[0] if losses else math.nan,
        "train_end": fmean(losses[-WINDOW:]) if losses else math.nan,
        "train_max": max(filter(math.isfinite, losses), default=math.nan),
    }


def count_spikes(losses: Sequence[float]) -> int:
    """Steps whose loss is above twice the median of the ten before.

    Args:
        losses: Of each step.

    Returns:
        Their number.
    """
    return sum(losses[step] > 2 * median(losses[step - WINDOW : step]) for step in range(WINDOW, len(losses)))


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """Steps until the mean of ten losses is below a target.

    Args:
        losses: Of each step.
        target: The target.

    Returns:
        How many; None if that never happens.
    """
    for step in range(WINDOW, len(losses) + 1):
        if fmean(losses[step - WINDOW : step]) < target:
            return step
    return None
