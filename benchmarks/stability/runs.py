"""One run of the stability study: training, and what is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import get_linear_schedule_with_warmup

from benchmarks.stability.arms import Arm, build
from benchmarks.stability.data import Batch, StabilityData, evaluate, without_tasks
from benchmarks.stability.settings import Setting

WARMUP = 0.05
WINDOW = 10
CLIP_AT = 1.0


def run_once(
    arm: Arm,
    setting: Setting,
    data: StabilityData,
    training: Sequence[Batch],
    rate: float,
    seed: int,
) -> dict[str, Any]:
    """Train and evaluate once; what is not finite is None. Losses are in nats."""
    started, cpu_started = time.perf_counter(), time.process_time()
    model = build(arm, setting, data.base, seed)
    losses, gradients, failure = train(
        model, training, rate, takes_tasks=arm.is_hyperadapter, clip=arm.clip, weight_decay=arm.weight_decay
    )
    loss, accuracy = math.nan, math.nan
    if failure is None:
        loss, accuracy = evaluate(model, data.evaluation, takes_tasks=arm.is_hyperadapter)
        failure = None if math.isfinite(loss) else "final loss"
    values = {
        "accuracy": accuracy if failure is None else math.nan,
        "loss": loss,
        "base_loss": data.base_loss,
        "base_accuracy": data.base_accuracy,
        "largest_gradient": max(filter(math.isfinite, gradients), default=math.nan),
    }
    return {
        **{name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in values.items()},
        "spikes": count_spikes(losses),
        "failure": failure,
        "failed_step": len(losses) if failure else None,
        "diverged": failure is not None or loss > data.base_loss,
        "parameters": model.get_nb_trainable_parameters()[0],
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu_started, 2),
    }


def train(
    model: PeftModel,
    training: Sequence[Batch],
    rate: float,
    *,
    takes_tasks: bool,
    clip: bool = False,
    weight_decay: float = 0.0,
) -> tuple[list[float], list[float], str | None]:
    """Train until the end, or until something is not finite; the model is left in evaluation mode.

    The rate rises over the first 5% of the steps and then falls to zero. Returned are the losses and the gradients'
    norms before clipping, of each step, and what failed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=weight_decay)
    warmup = max(1, round(WARMUP * len(training)))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(training))
    losses: list[float] = []
    gradients: list[float] = []
    model.train()
    for batch in training:
        try:
            loss = model(**batch if takes_tasks else without_tasks(batch)).loss
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
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, CLIP_AT, norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return losses, gradients, None


def count_spikes(losses: Sequence[float]) -> int:
    """Steps whose loss is above twice the median of the ten before."""
    return sum(losses[step] > 2 * median(losses[step - WINDOW : step]) for step in range(WINDOW, len(losses)))
