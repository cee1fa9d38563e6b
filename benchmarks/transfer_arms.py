"""The arms of the transfer benchmark: how each is trained and tested.

Rows come as they are measured. Their ``seconds`` tell how long adding the task took; training's are in the row of the
trained tasks.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, TrainingArguments

from benchmarks.transfer_baselines import (
    BATCH_SIZE,
    FRESH_LORA,
    FRESH_RANK,
    TEMPERATURE,
    Row,
    add_lora,
    fit_examples,
    poly_accuracy,
    train_lora,
    train_poly,
    trainable_state,
)
from benchmarks.transfer_data import TransferData, descriptions_for
from examples.support.matching import accuracy
from examples.support.task_descriptions import DESCRIPTIONS
from examples.support.text_tasks import encoder_path
from hyperadapt import HyperAdapterConfig
from hyperadapt.tasks.fitting import default_arguments
from hyperadapt.trainer import HyperAdapterTrainer

# Everything of the hyperadapter that one may tune: its configuration, its training, and fitting examples, the last two
# as changes of the training arguments below and of the library's own.
HYPERADAPT: dict[str, Any] = {"r": 8, "task_embedding": "text", "conditioning": "gated"}
HYPERADAPT_TRAINING: dict[str, Any] = {"learning_rate": 5e-3}
HYPERADAPT_EXAMPLES: dict[str, Any] = {}

TRAINED = "trained"
"""In rows, the mean over the trained tasks stands for a task of this name."""


def base_rows(data: TransferData, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Test the base model, and always answering the most frequent class.

    Args:
        data: The data.
        options: The command's options.
        seed: Has no effect here.

    Yields:
        Rows.
    """
    yield from _rows("majority", data, lambda name: data.majority[name])
    model = data.load_base()
    yield from _rows("base", data, lambda name: accuracy(model, data.test[name]))


def lora_rows(data: TransferData, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Train one LoRA on all tasks and test it.

    Args:
        data: The data.
        options: The command's options, with ``parameters``, the number to match.
        seed: Of weights and order.

    Yields:
        Rows.
    """
    model, extra = train_lora(data, options.parameters, seed, options.steps)
    yield from _rows("lora", data, lambda name: accuracy(model, data.test[name]), **extra)


def fresh_rows(data: TransferData, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Fit a new LoRA on examples.

    Args:
        data: The data.
        options: The command's options.
        seed: Of weights, examples and order.

    Yields:
        Rows.
    """
    model = add_lora(data, FRESH_RANK, seed)
    yield from _few_shot(f"lora r={FRESH_RANK}, examples", model, FRESH_LORA, data, options, seed)


def poly_rows(data: TransferData, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Train PEFT's Poly and test it, on held-out tasks with the mean of the trained tasks' routing logits.

    Args:
        data: The data.
        options: The command's options, with ``parameters``, the number to match.
        seed: Of weights and order.

    Yields:
        Rows.
    """
    model, extra = train_poly(data, options.parameters, seed, options.steps)
    yield from _rows("poly", data, lambda name: poly_accuracy(model, data, name), **extra)


def hyperadapt_rows(data: TransferData, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Train the hyperadapter, and add each held-out task by descriptions and by examples.

    Args:
        data: The data.
        options: The command's options.
        seed: Of weights, examples, order and wording.

    Yields:
        Rows.
    """
    model = add_hyperadapter(data, seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(model, data, options.steps, seed, folder).train()
    model.eval()
    extra = {"parameters": model.get_nb_trainable_parameters()[0], "seconds": time.monotonic() - started}
    yield from _rows("hyperadapt true", data, lambda name: accuracy(model, data.test[name], tasks=name), [], **extra)

    for kind, descriptions in descriptions_for([task.name for task in data.tasks], data.held_out, seed).items():
        for name, description in descriptions.items():
            row = _added(model, data, name, description=description)
            yield {"arm": f"hyperadapt {kind}", **row, "n": 0, "description": description}
    for name, count in itertools.product(data.held_out, options.examples):
        with tempfile.TemporaryDirectory() as folder:
            arguments = default_arguments(folder, count, model.device)
            for field, value in HYPERADAPT_EXAMPLES.items():
                setattr(arguments, field, value)
            arguments.max_steps, arguments.seed = min(arguments.max_steps, options.steps), seed
            examples, collate = data.examples(name, count, seed), DataCollatorWithPadding(data.tokenizer)
            row = _added(model, data, name, examples=examples, data_collator=collate, training_arguments=arguments)
        yield {"arm": "hyperadapt, examples", **row, "n": count}


ARMS: dict[str, Callable[[TransferData, argparse.Namespace, int], Iterator[Row]]] = {
    "base": base_rows,
    "lora": lora_rows,
    "fresh": fresh_rows,
    "poly": poly_rows,
    "hyperadapt": hyperadapt_rows,
}


def add_hyperadapter(data: TransferData, seed: int) -> PeftModel:
    """The base model with a new hyperadapter for the trained tasks.

    Args:
        data: The data.
        seed: Of its weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    config = HyperAdapterConfig(
        target_modules="all-linear",
        tasks={name: list(DESCRIPTIONS[name]) for name in data.trained},
        text_encoder=str(encoder_path()),
        **HYPERADAPT,
    )
    return get_peft_model(data.load_base(), config)


def make_trainer(model: PeftModel, data: TransferData, steps: int, seed: int, folder: str) -> HyperAdapterTrainer:
    """The hyperadapter's trainer.

    Args:
        model: The base model with the hyperadapter.
        data: The data.
        steps: Optimiser steps.
        seed: Of the order.
        folder: Where it may write.

    Returns:
        The trainer.
    """
    arguments = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "warmup_steps": steps // 16,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    return HyperAdapterTrainer(
        model,
        TrainingArguments(**arguments | HYPERADAPT_TRAINING),
        DataCollatorWithPadding(data.tokenizer),
        {name: data.train[name] for name in data.trained},
        temperature=TEMPERATURE,
    )


def _few_shot(
    arm: str, model: PeftModel, settings: Row, data: TransferData, options: argparse.Namespace, seed: int
) -> Iterator[Row]:
    start = trainable_state(model)
    # A hasty run hurries here, too.
    settings = settings | {"steps": min(settings["steps"], options.steps)}
    for name, count in itertools.product(data.held_out, options.examples):
        model.load_state_dict(start, strict=False)
        started = time.monotonic()
        fit_examples(model, data.examples(name, count, seed), data, seed, **settings)
        seconds = time.monotonic() - started
        score = accuracy(model, data.test[name])
        yield {"arm": arm, "task": name, "n": count, "accuracy": score, "seconds": seconds}


def _added(model: PeftModel, data: TransferData, name: str, **how: Any) -> Row:
    started = time.monotonic()
    model.add_task("new", **how)
    seconds = time.monotonic() - started
    score = accuracy(model.eval(), data.test[name], tasks="new")
    model.remove_task("new")
    return {"task": name, "accuracy": score, "seconds": seconds}


def _rows(
    arm: str, data: TransferData, score: Callable[[str], float], names: Sequence[str] | None = None, **extra: Any
) -> Iterator[Row]:
    """Rows of the held-out tasks (or of `names`), and one of the mean over trained tasks."""
    for name in data.held_out if names is None else names:
        yield {"arm": arm, "task": name, "n": 0, "accuracy": score(name), "seconds": 0.0}
    mean = float(np.mean([score(name) for name in data.trained]))
    yield {"arm": arm, "task": TRAINED, "n": 0, "accuracy": mean, "seconds": 0.0, **extra}
