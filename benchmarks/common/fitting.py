"""Training as ``Trainer`` does by default, without its output."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup


def fit(model: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, learning_rate: float) -> None:
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
