"""Rows and base model of the stability study: the output of frozen lower layers stands in place of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.stability.settings import Setting
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import LabelMatcher, load_matcher
from examples.support.text_tasks import load_task
from hyperadapt.trainer import TASK_COLUMN, TaskSampler

FROZEN_LAYERS = 3
EVALUATION_BATCH = 64

Batch = dict[str, Tensor]


class Row(NamedTuple):
    """One row: states of the lower layers `(length, hidden_size)` in bfloat16, its class among all tasks', its task."""

    states: Tensor
    label: int
    task: int


@dataclass
class StabilityData:
    """What all runs of a setting share.

    Attributes:
        base: The layers above the frozen ones; ``input_ids`` are states.
        train: Training rows.
        evaluation: Batches of validation or test rows.
        in_batches: Pads rows to batches of a size, in order.
        base_loss: The base model's mean loss on the evaluation rows, in nats.
        base_accuracy: Its accuracy there.
    """

    base: nn.Module
    train: list[Any]
    evaluation: list[Batch]
    in_batches: Callable[[Sequence[Any], int], Iterator[Batch]]
    base_loss: float
    base_accuracy: float

    def training_batches(self, setting: Setting, seed: int) -> list[Batch]:
        """The batches of a seed, the same for all arms; tasks have equal shares."""
        order = list(TaskSampler([row.task for row in self.train], setting.batch_size, seed=seed))
        chosen = order[: setting.steps * setting.batch_size]
        training = list(self.in_batches([self.train[index] for index in chosen], setting.batch_size))
        if len(training) < setting.steps:
            raise ValueError(f"steps={setting.steps} take more than the {len(self.train)} rows. Raise train_rows.")
        return training


def load_data(setting: Setting, split: str) -> StabilityData:
    """Read rows and base model of a setting; its runs are evaluated on a split."""
    if setting.is_chat:
        from benchmarks.stability.chats import load_chats

        base, train, rows, collate = load_chats(setting, split)
    else:
        base, train, rows = _load_texts(setting, split)
        collate = in_batches
    evaluation = list(collate(rows, EVALUATION_BATCH))
    return StabilityData(base, train, evaluation, collate, *evaluate(base, evaluation, takes_tasks=False))


def _load_texts(setting: Setting, split: str) -> tuple[LabelMatcher, list[Row], list[Row]]:
    tasks, tokenizer = [load_task(name) for name in setting.tasks], load_tokenizer()
    base = load_matcher(tasks, tokenizer, torch.bfloat16)
    lower = split_encoder(base, setting.frozen_layers)
    counts = {"train": setting.train_rows, split: setting.rows}
    train, evaluation = (
        [
            row
            for encoded in encode(tasks, name, tokenizer, max_rows=count, max_length=setting.max_length)
            for batch in batches(encoded, tokenizer)
            for row in computed_rows(lower, batch)
        ]
        for name, count in counts.items()
    )
    return base, train, evaluation


@torch.no_grad()
def computed_rows(lower: nn.Module, batch: Batch) -> Iterator[Row]:
    """The rows of a batch, with the lower layers' output."""
    mask = batch["attention_mask"]
    states = lower(batch["input_ids"], mask, batch["token_type_ids"]).last_hidden_state
    columns = (mask.sum(1).tolist(), batch["labels"].tolist(), batch["tasks"].tolist())
    for row, length, label, task in zip(states, *columns, strict=True):
        # A clone, since a slice would keep the padded batch in memory.
        yield Row(row[:length].clone(), label, task)


def in_batches(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Pad rows to batches with ``tasks``, in order."""
    for start in range(0, len(rows), size):
        members = rows[start : start + size]
        lengths = torch.tensor([len(row.states) for row in members])
        yield {
            "input_ids": pad_sequence([row.states for row in members], batch_first=True),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": torch.tensor([row.label for row in members]),
            "tasks": torch.tensor([row.task for row in members]),
        }


class GivenStates(nn.Module):
    """In the place of an encoder's embeddings, where its input are the states of lower layers."""

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        """Pass the states on."""
        return input_ids


def split_encoder(model: LabelMatcher, frozen_layers: int = FROZEN_LAYERS) -> nn.Module:
    """Take the lower layers off a model, and its dropout; they are returned, an encoder."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # On a CPU the backward of fused attention in bfloat16 takes longer than all else together.
    model.set_attn_implementation("eager")
    lower = copy.deepcopy(model.bert)
    lower.encoder.layer = lower.encoder.layer[:frozen_layers]
    model.bert.encoder.layer = model.bert.encoder.layer[frozen_layers:]
    model.bert.embeddings = GivenStates()
    return lower


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], *, takes_tasks: bool) -> tuple[float, float]:
    """Mean loss in nats and accuracy of a model in evaluation mode; a chat is right if all of its answer's tokens are.

    That is what greedy generation would answer, since a token is only asked for after the right ones.
    """
    losses, hits = [], []
    for batch in batches:
        output = model(**batch if takes_tasks else without_tasks(batch))
        labels = batch["labels"]
        losses.append(float(output.loss) * len(labels))
        right = (output.logits.argmax(-1) == labels) | (labels < 0)
        hits.append(right.reshape(len(labels), -1).all(1))
    correct = torch.cat(hits)
    return sum(losses) / len(correct), float(correct.float().mean())


def without_tasks(batch: Batch) -> Batch:
    """A batch for a model that knows no tasks."""
    return {name: column for name, column in batch.items() if name != TASK_COLUMN}
