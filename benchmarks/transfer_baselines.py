"""Baselines of the transfer benchmark: a LoRA on all tasks, PEFT's Poly, and fitting a LoRA on a few examples.

``transfer_search`` chose their settings on validation rows of trained tasks, with one seed. Mean accuracy after 150
steps at each learning rate: LoRA 0.745 (5e-4), 0.761 (1e-3), 0.763 (2e-3), where the smaller of two equals was taken
for the longer run; Poly 0.721 (3e-3), 0.762 (1e-2, the largest that was tried). Fresh LoRA, mean over 8 and 64
examples, after 20 and 60 steps: 0.786 and 0.819 (5e-4), 0.814 and 0.797 (1e-3), 0.780 and 0.781 (2e-3).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from benchmarks.transfer_data import TransferData
from examples.support.matching import accuracy
from hyperadapt.trainer import TASK_COLUMN, TaskCollator, TaskSampler, concatenate_tasks

LORA_LEARNING_RATE = 1e-3
POLY_LEARNING_RATE = 1e-2
FRESH_LORA = {"learning_rate": 5e-4, "steps": 60}

POLY_SKILLS = 4
FRESH_RANK = 8
TEMPERATURE = 2.0
BATCH_SIZE = 32

Row = dict[str, Any]
Batch = dict[str, Tensor]


def add_lora(data: TransferData, rank: int, seed: int) -> PeftModel:
    """The base model with a new LoRA.

    Args:
        data: The data.
        rank: Its rank.
        seed: Of its weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    return get_peft_model(data.load_base(), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def train_lora(
    data: TransferData, parameters: int, seed: int, steps: int, learning_rate: float = LORA_LEARNING_RATE
) -> tuple[PeftModel, Row]:
    """Train one LoRA on all trained tasks.

    Args:
        data: The data.
        parameters: Trainable parameters to match.
        seed: Of weights and order.
        steps: Optimiser steps.
        learning_rate: The highest learning rate.

    Returns:
        The model, in evaluation mode, and what to note in its rows.
    """
    model = add_lora(data, max(1, round(parameters / _parameters_per_rank(data))), seed)
    return model, _fit_tasks(model, model, data, steps, learning_rate, seed)


def train_poly(
    data: TransferData, parameters: int, seed: int, steps: int, learning_rate: float = POLY_LEARNING_RATE
) -> tuple[PeftModel, Row]:
    """Train PEFT's Poly on all trained tasks, then give one further task the mean of their routing logits.

    Args:
        data: The data.
        parameters: Trainable parameters to match.
        seed: Of weights and order.
        steps: Optimiser steps.
        learning_rate: The highest learning rate.

    Returns:
        The model, in evaluation mode, and what to note in its rows.
    """
    torch.manual_seed(seed)
    rank = max(1, round(parameters / _parameters_per_rank(data) / POLY_SKILLS))
    number = len(data.trained)
    config = PolyConfig(r=rank, n_tasks=number + 1, n_skills=POLY_SKILLS, target_modules="all-linear")
    model = get_peft_model(data.load_base(), config)
    # PeftModel without a task type passes by the tuner's own forward, which is what takes task ids.
    extra = _fit_tasks(model, model.base_model, data, steps, learning_rate, seed, task_column="task_ids")
    with torch.no_grad():
        for name, logits in model.named_parameters():
            if name.endswith("module_logits"):
                logits[number] = logits[:number].mean(0)
    return model, extra


def poly_accuracy(model: PeftModel, data: TransferData, name: str) -> float:
    """Test accuracy of a Poly model.

    Args:
        model: The model.
        data: The data.
        name: The task, trained or not.

    Returns:
        The accuracy.
    """
    task = data.trained.index(name) if name in data.trained else len(data.trained)
    batches = [batch | {"task_ids": torch.full_like(batch["labels"], task)} for batch in data.test[name]]
    return accuracy(model.base_model, batches)


def task_batches(data: TransferData, seed: int, task_column: str | None = TASK_COLUMN) -> Iterator[Batch]:
    """The batches that ``HyperAdapterTrainer`` draws with this seed.

    Args:
        data: The data.
        seed: Of their order.
        task_column: Name of the column of task ids; None leaves it out.

    Yields:
        Batches without end.
    """
    rows = concatenate_tasks({name: data.train[name] for name in data.trained}, data.trained)
    sampler = TaskSampler(rows[TASK_COLUMN], BATCH_SIZE, temperature=TEMPERATURE, seed=seed)
    collate = TaskCollator(DataCollatorWithPadding(data.tokenizer))
    loader = DataLoader(rows, BATCH_SIZE, sampler=sampler, collate_fn=collate)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for batch in loader:
            tasks = batch.pop(TASK_COLUMN)
            yield batch if task_column is None else {**batch, task_column: tasks}


def fit(model: nn.Module, batches: Iterable[Batch], steps: int, learning_rate: float) -> None:
    """Train as ``Trainer`` does by default: AdamW, warm-up, linear decay, clipped gradients.

    Args:
        model: The model; is left in evaluation mode.
        batches: At least `steps` batches.
        steps: Optimiser steps.
        learning_rate: The highest learning rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 16, steps)
    model.train()
    for batch in itertools.islice(batches, steps):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def fit_examples(
    model: PeftModel, examples: Dataset, data: TransferData, seed: int, *, learning_rate: float, steps: int
) -> None:
    """Fit an adapter on a few examples, in random batches.

    Args:
        model: The model; is left in evaluation mode.
        examples: Encoded rows.
        data: The data.
        seed: Of order and dropout.
        learning_rate: The highest learning rate.
        steps: Optimiser steps.
    """
    torch.manual_seed(seed)
    collate = DataCollatorWithPadding(data.tokenizer)
    loader = DataLoader(examples, min(BATCH_SIZE, len(examples)), shuffle=True, collate_fn=collate, drop_last=True)
    fit(model, itertools.chain.from_iterable(itertools.repeat(loader)), steps, learning_rate)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, to go back to with ``load_state_dict(state, strict=False)``.

    Args:
        model: The model.

    Returns:
        Name -> values.
    """
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _parameters_per_rank(data: TransferData) -> int:
    layers = data.load_base().bert.encoder.modules()
    return sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def _fit_tasks(
    model: PeftModel,
    callee: nn.Module,
    data: TransferData,
    steps: int,
    learning_rate: float,
    seed: int,
    task_column: str | None = None,
) -> Row:
    """Train on the trained tasks, and give the model their ids by the name of `task_column`, if it takes them."""
    started = time.monotonic()
    fit(callee, task_batches(data, seed, task_column), steps, learning_rate)
    return {"parameters": model.get_nb_trainable_parameters()[0], "seconds": time.monotonic() - started}
