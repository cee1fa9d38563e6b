"""The arms of the multi-task benchmark: what is trained on the tasks, and how it is told them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig, get_peft_model
from torch import nn

from benchmarks.common.fitting import fit
from benchmarks.multitask.data import Batch, MultitaskData
from benchmarks.stability.arms import plain
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.hypernetwork import Hypernetwork

RANK = 8
# Where an arm says nothing else. The defaults are those of its best arm, ``soft_frobenius, dim 16, gated``.
SIZE = {"hypernetwork_dim": 64, "conditioning": "additive"}
POLY_SKILLS = 4
LORA_RATES = (5e-4, 1e-3, 2e-3, 5e-3)
HYPERADAPT_RATES = (1e-3, 2e-3, 5e-3, 1e-2)
# What unit norms, and a hypernetwork of plain linear layers, train at in `stability`; elsewhere they would lose unseen.
UNIT_NORM_RATES = (1e-2, 3e-2, 1e-1, 3e-1)
PLAIN_RATES = (2e-5, 5e-5, 1e-4, 2e-4)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to adapt to all tasks.

    Attributes:
        config: Makes the configuration, given the tasks' names.
        rates: Learning rates to choose from.
        column: Name of the argument that tells the model the tasks; None if it is not told.
        is_separate: Whether each task has an adapter of its own, with its share of the steps.
        change: Changes the form of the hypernetwork.
    """

    config: Callable[[Sequence[str]], PeftConfig]
    rates: tuple[float, ...] = HYPERADAPT_RATES
    column: str | None = "tasks"
    is_separate: bool = False
    change: Callable[[Hypernetwork], None] | None = None


def _lora(rank: int, **fields: Any) -> Arm:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return Arm(lambda tasks: copy.deepcopy(config), LORA_RATES, column=None, **fields)


def _hyperadapt(
    rates: tuple[float, ...] = HYPERADAPT_RATES, change: Callable[[Hypernetwork], None] | None = None, **fields: Any
) -> Arm:
    return Arm(
        lambda tasks: HyperAdapterConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", tasks=list(tasks), **(SIZE | fields)
        ),
        rates,
        change=change,
    )


def _poly(tasks: Sequence[str]) -> PolyConfig:
    return PolyConfig(r=RANK, n_tasks=len(tasks), n_skills=POLY_SKILLS, target_modules="all-linear")


ARMS: dict[str, Arm] = {
    "separate loras": _lora(RANK, is_separate=True),
    "shared lora": _lora(RANK),
    "shared lora, r=32": _lora(32),
    "poly": Arm(_poly, (2e-3, 5e-3, 1e-2, 2e-2), column="task_ids"),
    "hyperformer style": _hyperadapt(PLAIN_RATES, plain, normalization="none"),
    "none": _hyperadapt(normalization="none"),
    "soft_frobenius": _hyperadapt(normalization="soft_frobenius"),
    "frobenius": _hyperadapt(UNIT_NORM_RATES, normalization="frobenius"),
    "whitening": _hyperadapt(UNIT_NORM_RATES, normalization="whitening"),
    "soft_frobenius, gated": _hyperadapt(normalization="soft_frobenius", conditioning="gated"),
    "soft_frobenius, row": _hyperadapt(normalization="soft_frobenius", head="row"),
    "soft_frobenius, row, gated": _hyperadapt(normalization="soft_frobenius", head="row", conditioning="gated"),
    "soft_frobenius, pair": _hyperadapt(normalization="soft_frobenius", head="pair"),
    "none, dim 16, gated": _hyperadapt(normalization="none", hypernetwork_dim=16, conditioning="gated"),
    "soft_frobenius, dim 16": _hyperadapt(normalization="soft_frobenius", hypernetwork_dim=16),
    "soft_frobenius, dim 16, gated": _hyperadapt(
        normalization="soft_frobenius", hypernetwork_dim=16, conditioning="gated"
    ),
}


@dataclass
class _Trained:
    """Models, with the tasks that each serves, and what they cost."""

    models: list[tuple[nn.Module, Sequence[int]]] = field(default_factory=list)
    parameters: int = 0
    file_bytes: int = 0


def run_arm(
    arm: Arm, data: MultitaskData, *, fraction: float, steps: int, rate: float, seed: int, split: str
) -> Measured:
    """Train an arm and evaluate it.

    Args:
        arm: The arm.
        data: The data.
        fraction: Share of the training rows.
        steps: Optimiser steps, over all tasks.
        rate: The highest learning rate.
        seed: Of weights, rows and order.
        split: ``"validation"`` or ``"test"``.

    Returns:
        Accuracy by task and their mean, trainable parameters, size of the saved files, seconds of training.
    """
    started = time.perf_counter()
    trained = _train(arm, data, fraction, steps, rate, seed)
    seconds = time.perf_counter() - started
    accuracies = {
        data.tasks[task]: _accuracy(model, getattr(data, split)[task], arm.column)
        for model, tasks in trained.models
        for task in tasks
    }
    return {
        "accuracy": fmean(accuracies.values()),
        "accuracies": accuracies,
        "parameters": trained.parameters,
        "file_bytes": trained.file_bytes,
        "seconds": round(seconds, 1),
    }


def _train(arm: Arm, data: MultitaskData, fraction: float, steps: int, rate: float, seed: int) -> _Trained:
    everything = range(len(data.tasks))
    shares: list[tuple[int | None, Sequence[int]]] = (
        [(task, [task]) for task in everything] if arm.is_separate else [(None, everything)]
    )
    trained = _Trained()
    for only, tasks in shares:
        model = build(arm, data, seed)
        # PeftModel without a task type passes by Poly's own forward, which is what takes task ids.
        callee = model.base_model if arm.column == "task_ids" else model
        share = steps * len(tasks) // len(everything)
        batches = data.training_batches(fraction, share, seed, only)
        fit(callee, (_told(batch, arm.column) for batch in batches), share, rate)
        trained.models.append((callee, tasks))
        trained.parameters += model.get_nb_trainable_parameters()[0]
        trained.file_bytes += saved_bytes(model)
    return trained


def build(arm: Arm, data: MultitaskData, seed: int) -> PeftModel:
    """The base model with an arm's adapter.

    Args:
        arm: The arm.
        data: The data, whose base model stays as it is.
        seed: Of the adapter's weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(data.base), arm.config(data.tasks))
    if arm.change is not None:
        arm.change(model.base_model.hyperadapter_networks["default"].hypernetwork)
    return model


def saved_bytes(model: PeftModel) -> int:
    """Size of the adapter's weights on disk.

    Args:
        model: The model.

    Returns:
        Bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        # MiniLM comes out of a package, where PEFT looks for a changed vocabulary in vain.
        model.save_pretrained(folder, save_embedding_layers=False)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Iterable[Batch], column: str | None) -> float:
    hits = [model(**_told(batch, column)).logits.argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(hits).float().mean())


def _told(batch: Batch, column: str | None) -> Batch:
    """The batch with the tasks under the name that the model knows, if it knows them."""
    others = {name: values for name, values in batch.items() if name != "tasks"}
    return others if column is None else {**others, column: batch["tasks"]}
