"""The loss of each row of a batch, and for logs that of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORED = -100

# Sums and counts, float32, shape `(batch,)`, whose quotient is each row's mean loss.
Terms = tuple[Tensor, Tensor]
Formula = Callable[[Mapping[str, Any], Mapping[str, Any], float], Terms | None]


@dataclass(frozen=True)
class BatchLoss:
    """The loss that is optimised for a batch, and how it was normalised.

    Args:
        value: What ``compute_loss`` returned.
        num_items: Items of all batches that are accumulated, over which the loss is a mean; None for a mean over this
            batch.
        processes: Factor on a loss that is a mean over `num_items`.
        steps: Number of batches that are accumulated.
        smoothing: Label smoothing.
    """

    value: Tensor
    num_items: Tensor | int | None = None
    processes: int = 1
    steps: int = 1
    smoothing: float = 0.0


class TaskLosses:
    """Adds up the training loss of each task.

    How the loss follows from the rows is found out, not looked up by kind of model: by the formula that gives the loss
    of the whole batch. A batch of one task needs none.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        self._names = task_names
        self._totals = torch.zeros(2, len(task_names))
        self._known: Formula | None = None
        self._told = False

    @torch.no_grad()
    def add(
        self,
        tasks: Tensor,
        loss: BatchLoss,
        outputs: Any,
        inputs: Mapping[str, Any],
        alone: Mapping[int, float] | None = None,
    ) -> None:
        """Add a batch of rows with the task ids `tasks`, ``(batch,)``; the loss of each task alone, if it is known."""
        terms = self._explain(loss, outputs, inputs, len(tasks)) if isinstance(outputs, Mapping) else None
        if terms is None and alone is not None:
            terms = torch.tensor([alone[task] for task in tasks.tolist()]), torch.ones(len(tasks))
        if terms is None and len(torch.unique(tasks)) == 1:
            value = loss.value.float().mean() * (1 if loss.num_items is None else loss.steps)
            terms = value.expand(len(tasks)), torch.ones_like(tasks, dtype=torch.float32)
        if terms is not None:
            self._totals = self._totals.to(tasks.device).index_add(1, tasks, torch.stack(terms).to(tasks.device))
        elif not self._told:
            self._told = True
            logger.warning(
                "The loss of a batch of several tasks cannot be told apart by task, since it is no mean over rows or "
                "tokens that is known here: such batches are left out of the losses by task. Make one-task batches "
                "with max_tasks_per_batch=1, or pass log_task_losses=False."
            )

    def collect(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean loss of each task since the last call; `reduce` adds up over processes."""
        sums, counts = reduce(self._totals).tolist()
        self._totals = torch.zeros_like(self._totals)
        return {name: total / count for name, total, count in zip(self._names, sums, counts, strict=True) if count}

    def _explain(
        self, loss: BatchLoss, outputs: Mapping[str, Any], inputs: Mapping[str, Any], num_rows: int
    ) -> Terms | None:
        """What the rows add to the loss, by the formula that gives it; the last one that did is tried first."""
        for formulas in ([self._known] if self._known else [], FORMULAS):
            found = [(formula, formula(outputs, inputs, loss.smoothing)) for formula in formulas]
            fits = [
                (*_fit(loss, terms), formula)
                for formula, terms in found
                if terms is not None and len(terms[0]) == num_rows
            ]
            error, terms, self._known = min(fits, key=lambda fit: fit[0], default=(math.inf, None, None))
            if error < _TOLERANCES.get(loss.value.dtype, _TOLERANCE):
                return terms
        self._known = None
        return None


# Far above the rounding of a loss and far below what tells formulas apart, of which the nearest is taken.
_TOLERANCE = 1e-4
_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 1e-2}


def _fit(loss: BatchLoss, terms: Terms) -> tuple[float, Terms]:
    """Relative error of the loss that the terms give, and the terms normalised as the loss is."""
    sums, counts = terms
    value, total = float(loss.value.float().mean()), float(counts.sum())
    divisors = [total] if loss.num_items is None else [total, float(loss.num_items) / loss.processes]
    errors = [_error(float(sums.sum()), divisor, value) for divisor in divisors]
    best = min(range(len(divisors)), key=errors.__getitem__)
    # Trainer may count other items than the loss does, such as a first token that nothing predicts.
    scale = divisors[best] / total if loss.steps == 1 and total else 1.0
    # A model that makes a mean of each batch, though it is told the number of all items, has the means added up.
    times = loss.steps if loss.num_items is not None and not best else 1
    return errors[best], (sums * times, counts * scale)


def _error(total: float, divisor: float, value: float) -> float:
    given = total / divisor if divisor else math.nan
    if not math.isfinite(value):
        return math.inf if math.isfinite(given) else 0.0
    error = abs(given - value) / abs(value) if value else abs(given)
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def row_losses(logits: Tensor, labels: Tensor, *, shift: bool, smoothing: float = 0.0) -> Terms:
    """Terms of a language model or a token classifier: of the tokens whose label is not -100.

    `logits` has shape ``(batch, length, classes)``, and `labels` ``(batch, length)``. With `shift` the label of a token
    is the next. One row's logits at a time are widened to float32.
    """
    rows = [_token_losses(row, row_labels, shift, smoothing) for row, row_labels in zip(logits, labels, strict=True)]
    sums, counts = zip(*rows, strict=True)
    return torch.stack(sums), torch.stack(counts)


def _token_losses(logits: Tensor, labels: Tensor, shift: bool, smoothing: float) -> Terms:
    if shift:
        logits, labels = logits[:-1], labels[1:]
    total = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total, (labels != IGNORED).sum().float()


def _next_tokens(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    logits, labels = _pair(outputs, inputs)
    return row_losses(logits, labels, shift=True, smoothing=smoothing) if _are_classes(logits, labels, 3) else None


def _tokens(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    logits, labels = _pair(outputs, inputs)
    return row_losses(logits, labels, shift=False, smoothing=smoothing) if _are_classes(logits, labels, 3) else None


def _fused_tokens(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    """TRL's trainers do not form logits, but ``log_probs`` and ``label_mask``, shape ``(batch, length)``."""
    if "labels" not in inputs or "log_probs" not in outputs:
        return None
    return -outputs["log_probs"].float().sum(1), outputs["label_mask"].float().sum(1)


def _classes(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    logits, labels = _pair(outputs, inputs)
    labels = labels.squeeze(-1) if labels.ndim == 2 else labels
    return _class_losses(logits, labels, IGNORED, smoothing) if _are_classes(logits, labels, 2) else None


def _independent_labels(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    return _number_losses(*_pair(outputs, inputs), binary_cross_entropy_with_logits)


def _numbers(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    return _number_losses(*_pair(outputs, inputs), mse_loss)


def _spans(outputs: Mapping[str, Any], inputs: Mapping[str, Any], smoothing: float) -> Terms | None:
    """Questions that a span of the text answers: the mean of the losses of its two ends, if they are in the text."""
    if (
        not {"start_logits", "end_logits"} <= outputs.keys()
        or not {"start_positions", "end_positions"} <= inputs.keys()
    ):
        return None
    ends = []
    for end in ("start", "end"):
        logits, places = outputs[f"{end}_logits"], inputs[f"{end}_positions"].reshape(-1)
        length = logits.shape[1]
        ends.append(_class_losses(logits, places.clamp(0, length), length))
    return (ends[0][0] + ends[1][0]) / 2, ends[0][1]


def _pair(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits and labels; empty ones, which fit no formula, where there are none."""
    nothing = torch.empty(0)
    found = outputs.get("logits"), inputs.get("labels")
    logits, labels = (one if isinstance(one, Tensor) else nothing for one in found)
    return logits, labels


def _are_classes(logits: Tensor, labels: Tensor, ndim: int) -> bool:
    """Whether labels are classes, or -100, for logits of so many dimensions, of which the last is over classes."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    if logits.ndim != ndim or logits.shape[:-1] != labels.shape:
        return False
    # Others would be an error, which on a GPU ends the process.
    return bool((((labels >= 0) & (labels < logits.shape[-1])) | (labels == IGNORED)).all())


def _class_losses(logits: Tensor, labels: Tensor, ignored: int, smoothing: float = 0.0) -> Terms:
    losses = cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="none", label_smoothing=smoothing)
    return losses, (labels != ignored).float()


def _number_losses(logits: Tensor, labels: Tensor, loss: Callable[..., Tensor]) -> Terms | None:
    if logits.ndim != 2 or logits.numel() != labels.numel():
        return None
    losses = loss(logits.float(), labels.float().reshape(logits.shape), reduction="none").mean(1)
    return losses, torch.ones_like(losses)


FORMULAS: tuple[Formula, ...] = (
    _next_tokens,
    _tokens,
    _fused_tokens,
    _classes,
    _independent_labels,
    _numbers,
    _spans,
)
