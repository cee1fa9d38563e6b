"""sentence-transformers' trainer for many tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor

from hyperadapt.config.checks import shown
from hyperadapt.sentence_transformers.columns import TaskTextCollator, mapping_of, with_row_tasks
from hyperadapt.sentence_transformers.tasks_in_force import task_names_of
from hyperadapt.sentence_transformers.transformer import HyperAdapterTransformer
from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.trainer.checkpoints import WholeCheckpointsMixin

# What router mappings call one data set beside several, which has no name.
_UNNAMED = ""


class _Collator(TaskTextCollator):
    """Knows the columns of one data set beside several, too."""

    def _resolve_router_mapping(self, batch: dict[str, Any]) -> dict[str, str]:
        mapping: dict[str, str] = super()._resolve_router_mapping({"dataset_name": _UNNAMED, **batch})
        return mapping


class MultiTaskSentenceTransformerTrainer(WholeCheckpointsMixin, SentenceTransformerTrainer):
    """sentence-transformers' ``SentenceTransformerTrainer`` for many tasks, with its arguments.

    - With a dict, name -> data set, each batch is of one of them. Its texts have the task of that name; with
      ``router_mapping`` of the arguments, column -> task or name -> column -> task, columns have others.
    - A data set with a column ``tasks``, of names or of ids as ``concatenate_tasks`` makes it, gives mixed batches.
    - Logs show the loss of each data set, as ``loss_<name>``.
    - Checkpoints are complete or absent.

    Args:
        model: A ``SentenceTransformer`` with a hyperadapter.
        args: As of ``SentenceTransformerTrainer``.
        train_dataset: The rows to train on.
        eval_dataset: The rows to evaluate on.
        **kwargs: As of ``SentenceTransformerTrainer``; `loss` may be a dict, name -> loss.

    Raises:
        TypeError: If the model has no hyperadapter.
        ValueError: If a task is unknown, a column has none, or of two data sets of one name only that for training or
            that for evaluation has a column ``tasks``.
    """

    data_collator_class = _Collator

    def __init__(  # noqa: DOC503
        self,
        model: Any = None,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        module = model[0] if isinstance(model, SentenceTransformer) else None
        if not isinstance(module, HyperAdapterTransformer):
            raise TypeError(
                f"model is a {type(model).__name__} without a hyperadapter, but the trainer must know the tasks from "
                "the start. Pass a SentenceTransformer that was given to add_hyperadapter (not model_init)."
            )
        names = task_names_of(module)
        args = SentenceTransformerTrainingArguments("tmp_trainer") if args is None else copy.copy(args)
        train_dataset, eval_dataset = _each(train_dataset, names), _each(eval_dataset, names)
        args.router_mapping = _united_mapping(train_dataset, eval_dataset, args.router_mapping, names)
        self._sums: dict[str, Tensor] = {}
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss as sentence-transformers does, and add it up by data set."""
        name = inputs.get("dataset_name")
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if name is not None and model.training:
            loss = (result[0] if return_outputs else result).detach().float()
            sums = torch.stack([loss, torch.ones_like(loss)])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and where that is a training loss, also that of each data set."""
        if "loss" in logs and isinstance(self.train_dataset, Mapping):
            none = torch.zeros(2, device=self.args.device)
            gathered: Any = torch.stack([self._sums.get(name, none) for name in self.train_dataset])
            sums = self.accelerator.reduce(gathered, "sum").tolist()
            self._sums = {}
            logs = logs | {
                f"loss_{name}": total / count
                for name, (total, count) in zip(self.train_dataset, sums, strict=True)
                if count
            }
        super().log(logs, start_time)


def _each(data: Any, names: list[str]) -> Any:
    if isinstance(data, Mapping):
        return {name: with_row_tasks(dataset, names) for name, dataset in data.items()}
    return with_row_tasks(data, names)


def _united_mapping(train: Any, evaluation: Any, given: Any, names: list[str]) -> dict[str, Any]:
    """What both sides share: data set name -> column -> task, or column -> task where no data set has a name."""
    sides: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
    united: dict[str, Any] = {}
    for data in (train, evaluation):
        if data is not None:
            mapping = mapping_of(data, given, names)
            if not isinstance(data, Mapping):
                data, mapping = {_UNNAMED: data}, {_UNNAMED: mapping}
            sides.append((data, mapping))
            united |= {name: united.get(name, {}) | columns for name, columns in mapping.items()}
    for data, mapping in sides if len(names) > 1 else ():
        for name, dataset in data.items():
            # In this side the tasks of the rows count for them.
            lost = [column for column in dataset.column_names or () if column in united[name].keys() - mapping[name]]
            if lost:
                raise ValueError(
                    f"The data set {name!r} has a column {TASK_COLUMN!r} in only one of training and evaluation, so "
                    f"that the task of its columns {shown(lost)} is not known for both. Give both a column "
                    f"{TASK_COLUMN!r}, name the task of each column with router_mapping, or give one of the two "
                    "another name."
                )
    return united[_UNNAMED] if united.keys() == {_UNNAMED} else united
