"""TRL's metrics of each task: its trainer computes them once more, from what the model gave for the task's rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer

from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.trainer.rows import is_trl

# Whose loss is made of what each row's calls of the model give.
_BY_ROWS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")
# What is no mean over rows.
_COUNTS = ("num_tokens",)


class TaskMetrics:
    """Adds up metrics of each task over rows."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, task: str, metrics: Mapping[str, float], rows: int) -> None:
        """Add means over so many rows of a task; what is not a number is left out."""
        for name, value in metrics.items():
            if name not in _COUNTS and not math.isnan(value):
                total = self._sums.setdefault(f"{name}_{task}", [0.0, 0.0])
                total[0] += value * rows
                total[1] += rows

    def add_rewards(self, tasks: Sequence[str], rewards: Tensor, trainer: Any, lengths: Sequence[int]) -> None:
        """Add what completions of the tasks got, ``(rows, functions)``, NaN from functions for others, and lengths."""
        weighted = (rewards * trainer.reward_weights.to(rewards.device)).nansum(1)
        weighted[rewards.isnan().all(1)] = math.nan
        for task, total, row, length in zip(tasks, weighted.tolist(), rewards.tolist(), lengths, strict=True):
            values = {"reward": total, "completions/mean_length": float(length)}
            for name, value in zip(trainer.reward_func_names, row, strict=True):
                # Functions of one task have its name already.
                if not name.startswith(f"{task}/"):
                    values[f"rewards/{name}/mean"] = value
            self.add(task, values, rows=1)

    def collect(self) -> dict[str, float]:
        """Means as ``<metric>_<task>`` since the last call, over all processes."""
        totals: dict[str, list[float]] = {}
        for sums in gather_object([self._sums]):
            for name, (total, rows) in sums.items():
                known = totals.setdefault(name, [0.0, 0.0])
                totals[name] = [known[0] + total, known[1] + rows]
        self._sums = {}
        return {name: total / rows for name, (total, rows) in totals.items()}


def can_be_told_apart(trainer: Trainer) -> bool:
    """Whether a trainer's loss of some rows can be computed from what the model gave for the whole batch."""
    if trainer.args.torch_compile or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    return any(is_trl(trainer, name) for name in _BY_ROWS)


@contextmanager
def recorded(models: Sequence[Any]) -> Iterator[list[Any]]:
    """The outputs of all calls of models inside, in order."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        for model in models:
            handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
            stack.callback(handle.remove)
        yield outputs


@torch.no_grad()
def metrics_of_rows(
    trainer: Any,
    models: Sequence[nn.Module],
    compute_loss: Callable[..., Any],
    inputs: Mapping[str, Any],
    outputs: Sequence[Any],
    is_row: Tensor,
) -> dict[str, float]:
    """What a trainer logs of some rows of a batch, by name, and their ``loss``, a mean over them.

    ``is_row`` tells which, bool, ``(rows,)`` as the model sees them. The trainer is as it was before.
    """
    before = dict(vars(trainer))
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
    chosen = {name: _rows(value, is_row) for name, value in inputs.items() if name != TASK_COLUMN}
    if "num_items_in_batch" in chosen and "completion_mask" in chosen:
        # Tokens of the whole batch, over which the loss is a mean: the share of these rows.
        share = chosen["completion_mask"].sum() / inputs["completion_mask"].sum()
        chosen["num_items_in_batch"] = chosen["num_items_in_batch"] * share
    vars(trainer).update(
        _metrics=metrics, accelerator=_OneProcess(trainer.accelerator), current_gradient_accumulation_steps=1
    )
    try:
        with _answering(models, [_rows(output, is_row) for output in outputs]):
            loss = compute_loss(models[0], chosen)
    finally:
        vars(trainer).update(before)
    means = {name: sum(values) / len(values) for name, values in metrics["train"].items() if values}
    return means | {"loss": float(loss)}


class _OneProcess:
    """An accelerator that gathers nothing: tasks occur in some processes and not in others."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, value: Any) -> Any:
        return value

    def gather_for_metrics(self, value: Any) -> Any:
        return value

    def reduce(self, value: Any, reduction: str = "sum") -> Any:
        return value


@contextmanager
def _answering(models: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Have calls of models answered by outputs, in order."""
    answers = iter(outputs)
    before = [(model, vars(model).get("forward")) for model in models]
    for model in models:
        model.forward = lambda *args, **kwargs: next(answers)
    try:
        yield
    finally:
        for model, forward in before:
            if forward is None:
                del model.forward
            else:
                model.forward = forward


def _rows(value: Any, is_row: Tensor) -> Any:
    """The rows of what has as many as the model sees, or as a part of them: all chosen, or all rejected."""
    if isinstance(value, Mapping):
        return type(value)(**{name: _rows(one, is_row) for name, one in value.items()})
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if len(value) == len(is_row):
        return value[is_row.to(value.device)]
    if 2 * len(value) == len(is_row):
        return value[is_row[: len(value)].to(value.device)]
    return value
