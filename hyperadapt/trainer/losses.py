"""The loss of each row of a batch, for logs by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

IGNORED = -100


@torch.no_grad()
def row_losses(outputs: Mapping[str, Any], labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Sums and counts, float32, shape ``(batch,)``, whose quotient is each row's mean loss.

    Classification, multi-label classification and regression count a row as one; language models and token
    classification count the tokens whose label is not -100. One row's logits at a time are widened to float32.
    `outputs` holds ``logits``, ``(batch, classes)`` or ``(batch, length, classes)``; or, from TRL's trainers, which do
    not form them, ``log_probs`` and ``label_mask``, ``(batch, length)``. With `shift` the label of a token is the next.
    """
    if "log_probs" in outputs:
        return -outputs["log_probs"].float().sum(1), outputs["label_mask"].float().sum(1)
    logits = outputs.get("logits")
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != len(labels):
        raise ValueError(
            f"The loss of each row cannot be told from logits of shape {getattr(logits, 'shape', None)} and labels of "
            f"shape {tuple(labels.shape)}. Pass log_task_losses=False."
        )
    if logits.ndim == 2:
        losses = _losses(logits.float(), labels)
        return losses, torch.ones_like(losses)
    rows = [_token_losses(row, row_labels, shift) for row, row_labels in zip(logits, labels, strict=True)]
    sums, counts = zip(*rows, strict=True)
    return torch.stack(sums), torch.stack(counts)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    if not labels.is_floating_point():
        return cross_entropy(logits, labels, reduction="none")
    targets = labels.float().reshape(logits.shape)
    # As transformers chooses: one number is a regression, several are independent labels.
    loss = mse_loss if logits.shape[1] == 1 else binary_cross_entropy_with_logits
    return loss(logits, targets, reduction="none").mean(1)


def _token_losses(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    if shift:
        logits, labels = logits[:-1], labels[1:]
    total = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum().float()
