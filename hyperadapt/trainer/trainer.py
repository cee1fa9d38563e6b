"""transformers' Trainer for many tasks: sampling, logs and evaluation by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.saturation import REMEDY
from hyperadapt.trainer.batches import TASK_COLUMN, RepeatedSampler, TaskSampler
from hyperadapt.trainer.cards import TrainerCardMixin
from hyperadapt.trainer.checkpoints import WholeCheckpointsMixin
from hyperadapt.trainer.datasets import TaskDatasetsMixin
from hyperadapt.trainer.examples import give_examples
from hyperadapt.trainer.labels import give_labels
from hyperadapt.trainer.losses import BatchLoss, TaskLosses
from hyperadapt.trainer.metrics import TaskMetrics, can_be_told_apart, metrics_of_rows, recorded
from hyperadapt.trainer.monitor import PositionMonitor
from hyperadapt.trainer.rows import RowTasksMixin, check_arguments, is_sequential
from hyperadapt.tuner.active import active_network

logger = logging.get_logger(__name__)

# What is no measure of the model.
_NO_MEASURES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


class TaskTrainerMixin(TrainerCardMixin, TaskDatasetsMixin, RowTasksMixin):
    """What a multi-task run adds to ``Trainer`` or to a subclass of it, such as TRL's ``SFTTrainer``.

    Used as ``class MyTrainer(TaskTrainerMixin, SFTTrainer)``; ``HyperAdapterTrainer`` is the one for ``Trainer``.

    - Data sets are dicts, task name -> ``datasets.Dataset``, or have a column ``tasks``, which is not dropped.
    - Batches are drawn by ``TaskSampler``.
    - Logs show the training loss of each task, as ``loss_<task>``.
    - A classifier's tasks without labels get those that the data name, see ``HyperAdapterModel.set_labels``.
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
            ``grad_norm/<position>``, by the factors of all tasks, and to warn of positions where one is not finite;
            with a normalisation that has a bound also ``saturated_share``, of all updates those that are at it, and
            ``saturated_share/layer_<index>``, and to warn once if they are most.
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
        self.task_names = task_names_of(model, kwargs.get("peft_config"))
        self.temperature = temperature
        self.max_tasks_per_batch = max_tasks_per_batch
        self.log_task_losses = log_task_losses
        self._task_losses = TaskLosses(self.task_names)
        self._task_metrics = TaskMetrics()
        self._draws = False
        self._evaluated: str | None = None
        check_arguments(self, args)
        given = {
            "args": args,
            "data_collator": data_collator,
            "train_dataset": self._train_data(train_dataset),
            "eval_dataset": self._each_with_tasks(eval_dataset),
        }
        # Each trainer has an order of its own, and not all have each argument.
        super().__init__(model=model, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        self._carry_tasks()
        self._use_unprepared()
        if isinstance(self.train_dataset, Dataset):
            rows = self._remove_unused_columns(self.train_dataset, "training")
            is_packed = getattr(self.args, "packing", False)
            give_examples(self._model, rows, self.data_collator, self.args.seed, is_packed)
            give_labels(self._model, rows)
        # Found through the model as the other trainer left it.
        network = active_network(self._model)[1]
        self._monitor = PositionMonitor(network) if log_positions else None
        self._own_factors = network.config.own_factors
        self._told_saturation = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the other trainer does; the model's tasks must be those that the trainer was made with."""
        self._check_tasks()
        return super().train(*args, **kwargs)

    def _check_tasks(self) -> None:
        """Refuse a model whose tasks have changed: the ids of rows would mean others, and the optimizer train none."""
        config = active_network(self._model)[1].config
        if config.task_names != list(self.task_names):
            raise ValueError(
                f"The tasks of the model are {shown(config.task_names)} now, but were {shown(list(self.task_names))} "
                "when this trainer was made. Make a new one."
            )
        if config.own_factors != self._own_factors:
            raise ValueError(
                f"The tasks with factors of their own are {shown(config.own_factors)} now, but were "
                f"{shown(self._own_factors)} when this trainer was made, whose optimizer trains nothing else. Make a "
                "new one."
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as ``Trainer`` does, and average over tasks.

        Args:
            eval_dataset: The rows, or task name -> rows; None takes what the trainer was made with.
            ignore_keys: As in ``Trainer``.
            metric_key_prefix: As in ``Trainer``.
            **kwargs: As for the other trainer, such as what ``Seq2SeqTrainer`` generates with.

        Returns:
            The metrics; with a dict also ``<prefix>_mean_<metric>``, the unweighted mean over tasks of each number
            that all of them have (speeds aside).
        """
        self._check_tasks()
        if not isinstance(eval_dataset, str):
            eval_dataset = self._each_with_tasks(eval_dataset)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(data, Mapping):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
            return metrics
        metrics = {}
        for name, rows in data.items():
            # What the trainer was made with, it knows by name.
            part: Any = name if eval_dataset is None else rows
            # One by one, since trainers lose further arguments on the way from a dict to its data sets.
            self._evaluated = name
            try:
                metrics |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}", **kwargs)
            finally:
                self._evaluated = None
        means = _means(metrics, list(data), metric_key_prefix)
        self.log(dict(means))
        # As after each task, for early stopping.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return metrics | means

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **kwargs: Any,
    ) -> Any:
        """Predict as ``Trainer`` does.

        Args:
            test_dataset: The rows, with a column ``tasks``; or task name -> rows, which are predicted one task after
                another.
            ignore_keys: As in ``Trainer``.
            metric_key_prefix: As in ``Trainer``.
            **kwargs: As for the other trainer, such as what ``Seq2SeqTrainer`` generates with.

        Returns:
            transformers' ``PredictionOutput`` of all rows in order. Its metrics are over all of them; ``evaluate`` has
            those of each task.
        """
        self._check_tasks()
        if isinstance(test_dataset, Mapping | Dataset):
            test_dataset = self._with_tasks("test_dataset", test_dataset)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as the other trainer does, and add it up by task."""
        tasks = inputs[TASK_COLUMN]
        asked = self._asked(tasks, model)
        # A new dict: label smoothing takes the labels out of it.
        batch = self._routed(inputs, asked)
        with self._tasks_in_force(asked):
            if not self.log_task_losses or not model.training:
                return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
            # Not through return_outputs, for which TRL's trainers run the model a second time.
            is_by_rows = can_be_told_apart(self)
            with recorded(self._compared if is_by_rows else [model]) as outputs:
                result = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        alone = self._metrics_alone(tasks, batch, outputs) if is_by_rows else None
        loss = self._normalised(result[0] if return_outputs else result, num_items_in_batch)
        self._task_losses.add(tasks, loss, outputs[0] if outputs else None, inputs, alone)
        return result

    def _metrics_alone(self, tasks: Tensor, batch: Mapping[str, Any], outputs: Sequence[Any]) -> dict[int, float]:
        """Add TRL's metrics of each task in a batch; the loss of each."""
        losses, compute_loss = {}, super().compute_loss
        for task in torch.unique(tasks).tolist():
            is_row = tasks == task
            metrics = metrics_of_rows(self, self._compared, compute_loss, batch, outputs, is_row)
            losses[task] = metrics.pop("loss")
            self._task_metrics.add(self.task_names[task], metrics, int(is_row.sum()))
        return losses

    def _calculate_rewards(self, inputs: Sequence[Any], *columns: Any) -> Tensor:
        """Of TRL's trainers that generate: also add up the rewards of each task."""
        rewards: Tensor = super()._calculate_rewards(inputs, *columns)  # type: ignore[misc]
        if self.log_task_losses and self._model.training:
            # Those of other processes are there, too.
            own = rewards[self.accelerator.process_index * len(inputs) :][: len(inputs)]
            tasks = [self.task_names[row[TASK_COLUMN]] for row in inputs]
            self._task_metrics.add_rewards(tasks, own, self, [len(ids) for ids in columns[-1]])
        return rewards

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and where that is a training loss, also what was gathered by task and by position."""
        if self._evaluated is not None and hasattr(self, "_metrics"):
            # TRL's trainers would call those of all data sets alike.
            values = self._metrics["eval"]
            for name in list(values):
                values[f"{self._evaluated}_{name}"] = values.pop(name)
        if "loss" in logs:
            if self.log_task_losses:
                losses = self._task_losses.collect(
                    lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum")
                )
                logs |= {f"loss_{name}": loss for name, loss in losses.items()}
                logs |= self._task_metrics.collect()
            if self._monitor is not None:
                logs |= self._position_logs(self._monitor)
        super().log(logs, *args, **kwargs)

    def _position_logs(self, monitor: PositionMonitor) -> dict[str, float]:
        updates, gradients, self._saturation = monitor.collect()
        step = self.state.global_step
        diverged = [name for name in updates if not math.isfinite(updates[name] + gradients.get(name, 0.0))]
        if diverged:
            logger.warning(
                f"Step {step}: the update or its gradient is not finite at {len(diverged)} of {len(updates)} "
                f"positions, the first of them {diverged[0]!r}."
            )
        logs = {f"update_norm/{name}": value for name, value in updates.items()}
        logs |= {f"grad_norm/{name}": value for name, value in gradients.items()}
        if self._saturation is None:
            return logs
        if self._saturation.is_high and not self._told_saturation:
            self._told_saturation = True
            logger.warning(f"Step {step}: {self._saturation}. {REMEDY}")
        logs["saturated_share"] = self._saturation.share
        return logs | {f"saturated_share/{layer}": share for layer, share in self._saturation.layers.items()}

    def _normalised(self, loss: Any, num_items: Tensor | int | None) -> BatchLoss:
        is_scaled = num_items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        return BatchLoss(
            loss.detach(),
            num_items if is_scaled else None,
            processes=self.accelerator.num_processes if self.args.average_tokens_across_devices else 1,
            steps=getattr(self, "current_gradient_accumulation_steps", 1),
            smoothing=0.0 if self.label_smoother is None else self.label_smoother.epsilon,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, Dataset)
        if TASK_COLUMN not in dataset.column_names:
            raise ValueError(
                f"The prepared training data has no column {TASK_COLUMN!r} any more, only {dataset.column_names}: rows "
                "of several tasks were joined, as packing does. Turn packing off."
            )
        self._draws = True
        own: Any = super()._get_train_sampler(dataset)
        if is_sequential(self, self.args):
            return own
        repeats = hasattr(own, "mini_repeat_count")
        if not repeats and not isinstance(own, RandomSampler):
            raise TypeError(
                f"{type(self).__name__} draws rows with a {type(own).__name__}, whose order TaskSampler would break. "
                "Use it without TaskTrainerMixin, on data from concatenate_tasks."
            )
        sampler = self._drawn(dataset, own.batch_size if repeats else self._train_batch_size, self.args)
        # Accelerate's data loaders lose the epoch where batches are both dealt out to processes and skipped.
        self.remove_callback(_EpochSetter)
        self.add_callback(_EpochSetter(sampler))
        return RepeatedSampler(sampler, own.batch_size, own.mini_repeat_count, own.repeat_count) if repeats else sampler

    def get_train_dataloader(self) -> Any:
        """Make the data loader of the other trainer, and see that it draws batches by task if it was told how."""
        loader = super().get_train_dataloader()
        if not self._draws and (self.temperature != 1 or self.max_tasks_per_batch is not None):
            raise ValueError(
                f"{type(self).__name__} draws its batches itself, so temperature={self.temperature} and "
                f"max_tasks_per_batch={self.max_tasks_per_batch} cannot be followed. Leave both out."
            )
        return loader

    def _drawn(self, dataset: Dataset, batch_size: int, args: Any) -> TaskSampler:
        return TaskSampler(
            dataset.with_format("numpy")[TASK_COLUMN][:],
            batch_size,
            temperature=self.temperature,
            max_tasks_per_batch=self.max_tasks_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )


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


def task_names_of(model: Any, peft_config: Any) -> list[str]:
    """The tasks of the model that a trainer makes, or is given."""
    if isinstance(peft_config, HyperAdapterConfig):
        return peft_config.task_names
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The trainer got model={model!r}, but must know the tasks from the start: pass a model with a "
            "hyperadapter (not model_init), or to a trainer that takes one, a HyperAdapterConfig as peft_config."
        )
    return active_network(model)[1].config.task_names


def _means(metrics: Mapping[str, Any], tasks: Sequence[str], prefix: str) -> dict[str, float]:
    start = f"{prefix}_{tasks[0]}_"
    means = {}
    for name in [key.removeprefix(start) for key in metrics if key.startswith(start)]:
        values: list[Any] = [metrics.get(f"{prefix}_{task}_{name}") for task in tasks]
        # A task that diverged makes the mean NaN, which is never the best; a missing mean would end the run.
        if name not in _NO_MEASURES and all(isinstance(value, int | float) for value in values):
            means[f"{prefix}_mean_{name}"] = sum(values) / len(values)
    return means
