"""transformers' Trainer for many tasks: sampling, logs and evaluation by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hyperadapt.cards.card import may_be_written_anew, write_card
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.trainer.batches import TASK_COLUMN, TaskCollator, TaskSampler, concatenate_tasks
from hyperadapt.trainer.checkpoints import WholeCheckpointsMixin
from hyperadapt.trainer.losses import row_losses
from hyperadapt.trainer.monitor import PositionMonitor
from hyperadapt.tuner.active import active_network, find_tuner

logger = logging.get_logger(__name__)

_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class TaskTrainerMixin(Trainer):
    """What a multi-task run adds to ``Trainer`` or to a subclass of it, such as TRL's ``SFTTrainer``.

    Used as ``class MyTrainer(TaskTrainerMixin, SFTTrainer)``; ``HyperAdapterTrainer`` is the one for ``Trainer``.

    - Data sets are dicts, task name -> ``datasets.Dataset``, or have a column ``tasks``, which is not dropped.
    - Batches are drawn by ``TaskSampler``.
    - Logs show the training loss of each task, as ``loss_<task>``.
    - Evaluating a dict of data sets gives the metrics of each and their means, ``eval_mean_<metric>``, fit for
      ``metric_for_best_model``.

    Args:
        model: A model with a hyperadapter, or what the other trainer makes one of by its `peft_config`.
        args: As for the other trainer.
        data_collator: Likewise; the column ``tasks`` is carried past it.
        train_dataset: The rows to train on.
        eval_dataset: The rows to evaluate on.
        temperature: As in ``TaskSampler``.
        max_tasks_per_batch: As in ``TaskSampler``.
        log_task_losses: Whether to log the training loss of each task, at the cost of reading the logits once more.
        log_positions: Whether to log ``update_norm/<position>``, the largest ‖ΔW‖_F / ‖W₀‖_F of any task, and
            ``grad_norm/<position>``, by the factors of all tasks, and to warn of positions where one is not finite.
        **kwargs: As for the other trainer.

    Raises:
        TypeError: If the model has no hyperadapter, or a data set is of another type.
        ValueError: If a task is unknown, a data set has no column ``tasks``, a task to evaluate is called ``"mean"``,
            or the arguments ask for another way of sampling.
    """

    def __init__(  # noqa: DOC502
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        temperature: float = 1.0,
        max_tasks_per_batch: int | None = None,
        log_task_losses: bool = True,
        log_positions: bool = False,
        **kwargs: Any,
    ) -> None:
        config = kwargs.get("peft_config")
        self.task_names = (config if isinstance(config, HyperAdapterConfig) else _active_config(model)).task_names
        self.temperature = temperature
        self.max_tasks_per_batch = max_tasks_per_batch
        self.log_task_losses = log_task_losses
        self._task_sums = torch.zeros(2, len(self.task_names))
        _check_sampling(args)
        train_dataset = self._with_tasks("train_dataset", train_dataset)
        eval_dataset = self._each_with_tasks(eval_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        if not isinstance(self.data_collator, TaskCollator):
            self.data_collator = TaskCollator(self.data_collator)
        # Found through the model as the other trainer left it.
        base_model = find_tuner(self._model).model
        self._is_causal = type(base_model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self._monitor = PositionMonitor(active_network(self._model)[1]) if log_positions else None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as ``Trainer`` does, and average over tasks.

        Args:
            eval_dataset: The rows, or task name -> rows; None takes what the trainer was made with.
            ignore_keys: As in ``Trainer``.
            metric_key_prefix: As in ``Trainer``.

        Returns:
            The metrics; with a dict also ``<prefix>_mean_<metric>``, the unweighted mean over tasks of each number
            that all of them have (speeds aside).
        """
        if not isinstance(eval_dataset, str):
            eval_dataset = self._each_with_tasks(eval_dataset)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, Mapping):
            means = _means(metrics, list(data), metric_key_prefix)
            self.log(dict(means))
            # As after each task, for early stopping.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
            metrics |= means
        return metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as the other trainer does, and add it up by task."""
        # Label smoothing takes the labels out of the batch.
        tasks, labels = inputs[TASK_COLUMN], inputs.get("labels")
        if self.max_tasks_per_batch is not None or not model.training:
            # Ids on a GPU would generate as many tasks as there are rows, where few tasks are known to occur.
            inputs = inputs | {TASK_COLUMN: tasks.cpu()}
        if not self.log_task_losses or not model.training or labels is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        seen: list[Any] = []
        # Not through return_outputs, for which TRL's trainers run the model a second time.
        handle = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            handle.remove()
        terms = row_losses(seen[0], labels, shift=self._is_causal)
        self._task_sums = self._task_sums.to(tasks.device).index_add(1, tasks, torch.stack(terms))
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and where that is a training loss, also what was gathered by task and by position."""
        if "loss" in logs:
            if self.log_task_losses:
                sums, counts = self.accelerator.reduce(self._task_sums.to(self.args.device), "sum").tolist()
                self._task_sums.zero_()
                terms = zip(self.task_names, sums, counts, strict=True)
                logs |= {f"loss_{name}": total / count for name, total, count in terms if count}
            if self._monitor is not None:
                logs |= _position_logs(self._monitor, self.state.global_step)
        super().log(logs, *args, **kwargs)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter's card into the output folder, with what the last evaluation of each task gave."""
        if not self.is_world_process_zero():
            return
        folder = str(self.args.output_dir)
        write_card(
            self.accelerator.unwrap_model(self._model),
            folder,
            overwrite=may_be_written_anew(folder),
            title=model_name,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else list(tags or ()),
            results=_last_results(self.state.log_history, self.task_names),
            split="validation",
            training={
                "steps": self.state.global_step,
                "batch_size": self.args.train_batch_size * self.args.world_size,
                "learning_rate": self.args.learning_rate,
                "seed": self.args.seed,
            },
        )

    @property
    def _model(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _with_tasks(self, name: str, dataset: Any) -> Any:
        if isinstance(dataset, Mapping):
            return concatenate_tasks(dataset, self.task_names)
        if dataset is None or (isinstance(dataset, Dataset) and TASK_COLUMN in dataset.column_names):
            return dataset
        if isinstance(dataset, Dataset):
            raise ValueError(
                f"{name} has no column {TASK_COLUMN!r}, only {dataset.column_names}. Pass a dict, task name -> data "
                "set, or make the column with concatenate_tasks."
            )
        raise TypeError(
            f"{name} is of type {type(dataset).__name__}, but must be a datasets.Dataset or a dict, task name -> "
            "Dataset. Turn other data into one with Dataset.from_list, or train with transformers' own Trainer."
        )

    def _each_with_tasks(self, dataset: Any) -> Any:
        if not isinstance(dataset, Mapping):
            return self._with_tasks("eval_dataset", dataset)
        if "mean" in dataset:
            raise ValueError(
                "eval_dataset has a task 'mean', whose metrics would be taken for the mean over tasks. Rename the task."
            )
        return {
            name: rows
            if TASK_COLUMN in getattr(rows, "column_names", ())
            else concatenate_tasks({name: rows}, self.task_names)
            for name, rows in dataset.items()
        }

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if TASK_COLUMN not in columns:
            columns.append(TASK_COLUMN)

    def _get_train_sampler(self, train_dataset: Any = None) -> TaskSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, Dataset)
        if TASK_COLUMN not in dataset.column_names:
            raise ValueError(
                f"The prepared training data has no column {TASK_COLUMN!r} any more, only {dataset.column_names}: rows "
                "of several tasks were joined, as packing does. Turn packing off."
            )
        sampler = TaskSampler(
            dataset.with_format("numpy")[TASK_COLUMN][:],
            self._train_batch_size,
            temperature=self.temperature,
            max_tasks_per_batch=self.max_tasks_per_batch,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        # Accelerate's data loaders lose the epoch where batches are both dealt out to processes and skipped.
        self.remove_callback(_EpochSetter)
        self.add_callback(_EpochSetter(sampler))
        return sampler


class HyperAdapterTrainer(TaskTrainerMixin, WholeCheckpointsMixin):
    """transformers' ``Trainer`` for many tasks.

    See ``TaskTrainerMixin`` for what it adds, and ``WholeCheckpointsMixin`` for how it saves.
    """


class _EpochSetter(TrainerCallback):
    def __init__(self, sampler: TaskSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A resumed run starts in the middle of its epoch.
        self.sampler.set_epoch(int(state.epoch or 0))


def _active_config(model: Any) -> HyperAdapterConfig:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The trainer got model={model!r}, but must know the tasks from the start: pass a model with a "
            "hyperadapter (not model_init), or to a trainer that takes one, a HyperAdapterConfig as peft_config."
        )
    return active_network(model)[1].config


def _check_sampling(args: Any) -> None:
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={strategy!r} cannot be followed: batches are drawn by task. Leave it at 'random'."
        )


def _means(metrics: Mapping[str, Any], tasks: Sequence[str], prefix: str) -> dict[str, float]:
    start = f"{prefix}_{tasks[0]}_"
    means = {}
    for name in [key.removeprefix(start) for key in metrics if key.startswith(start)]:
        values: list[Any] = [metrics.get(f"{prefix}_{task}_{name}") for task in tasks]
        # A task that diverged makes the mean NaN, which is never the best; a missing mean would end the run.
        if name not in _SPEEDS and all(isinstance(value, int | float) for value in values):
            means[f"{prefix}_mean_{name}"] = sum(values) / len(values)
    return means


def _last_results(log_history: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as last logged."""
    results: dict[str, dict[str, float]] = {}
    for entry in log_history:
        for task in tasks:
            start = f"eval_{task}_"
            values = {key.removeprefix(start): value for key, value in entry.items() if key.startswith(start)}
            found = {name: value for name, value in values.items() if name in ("accuracy", "loss")}
            if found:
                results[task] = found
    return results


def _position_logs(monitor: PositionMonitor, step: int) -> dict[str, float]:
    updates, gradients = monitor.collect()
    diverged = [name for name in updates if not math.isfinite(updates[name] + gradients.get(name, 0.0))]
    if diverged:
        logger.warning(
            f"Step {step}: the update or its gradient is not finite at {len(diverged)} of {len(updates)} positions, "
            f"the first of them {diverged[0]!r}."
        )
    logs = {f"update_norm/{name}": value for name, value in updates.items()}
    return logs | {f"grad_norm/{name}": value for name, value in gradients.items()}
