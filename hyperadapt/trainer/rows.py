"""The task of each row, in trainers that arrange rows in ways of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hyperadapt.tasks.ids import can_read
from hyperadapt.trainer.batches import TASK_COLUMN, TaskCollator
from hyperadapt.tuner.active import use_tasks
from hyperadapt.tuner.model import HyperAdapterModel

# Of TRL's trainers whose loss splits a batch into blocks, [all chosen; all rejected].
_BLOCKS = {"CPOTrainer": 2, "DPOTrainer": 2, "ORPOTrainer": 2, "RewardTrainer": 2}

# What generates without the tasks of the rows, and why.
_WITHOUT_TASKS = {
    "use_vllm": "vLLM is given weights into which one task is merged",
    "generate_during_eval": "completions of random rows are generated for the logs",
    "use_transformers_continuous_batching": "rows are taken apart and generated in an order of its own",
}


class RowTasksMixin(Trainer):
    """Has the model know the tasks of a batch wherever ``Trainer``, or a subclass of it, calls the model."""

    task_names: Sequence[str]
    max_tasks_per_batch: int | None
    # Of the rows that completions are being generated for.
    _generated: Tensor

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch as the other trainer does, also if its backward pass calls the model again."""
        with self._tasks_of_batch_in_force(inputs, model):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch as the other trainer does, whether or not it passes tasks to the model."""
        with self._tasks_of_batch_in_force(inputs, model):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Of TRL's trainers with a reference model, which compute this before training."""
        asked = self._asked(inputs[TASK_COLUMN], model)
        with self._tasks_in_force(asked):
            return super().compute_ref_log_probs(model, self._routed(inputs, asked))  # type: ignore[misc]

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # The other trainer calls it while it is made.
        self._carry_tasks()
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Of TRL's trainers that generate: rows become a batch, which is shuffled and split before it is trained on."""
        self._generated = tasks = torch.tensor([row[TASK_COLUMN] for row in inputs])
        with self._tasks_in_force(self._asked(tasks, self._model)):
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        _check_rows(type(self).__name__, len(tasks), len(batch["completion_ids"]))
        return batch | {TASK_COLUMN: tasks.to(batch["completion_ids"].device)}

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Of TRL's trainers that generate: a part of the rows at a time, each with its tasks."""
        compute = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        # Images lie in ways of their own.
        has_images = any(kwargs.get(name) is not None for name in ("pixel_values", "num_images"))
        if batch_size is None or batch_size >= len(input_ids) or has_images:
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        parts = []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            with self._tasks_in_force(self._asked(self._generated[rows], model)):
                parts.append(compute(model, input_ids[rows], attention_mask[rows], logits_to_keep, **kwargs))
        logps, entropies, losses = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    @property
    def _model(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def _compared(self) -> list[nn.Module]:
        """The models that a loss is made of."""
        other = getattr(self, "ref_model", None)
        return [self._model] if other is None else [self._model, self.accelerator.unwrap_model(other)]

    def _carry_tasks(self) -> None:
        if not isinstance(self.data_collator, TaskCollator):
            keeps_rows = hasattr(super(), "_generate_and_score_completions")
            self.data_collator = TaskCollator(self.data_collator, blocks=_blocks_of(self), keeps_rows=keeps_rows)

    def _asked(self, tasks: Tensor, model: nn.Module) -> Tensor | str:
        """What the model is asked for: the name if the batch has one task, which any arrangement of rows keeps.

        Ids on a GPU would generate as many tasks as there are rows, where few tasks are known to occur.
        """
        if self.args.torch_compile or (model.training and self.max_tasks_per_batch is None and not can_read(tasks)):
            return tasks
        tasks = tasks.cpu()
        distinct = torch.unique(tasks)
        return self.task_names[int(distinct)] if len(distinct) == 1 else tasks

    def _routed(self, inputs: Mapping[str, Any], asked: Tensor | str) -> dict[str, Any]:
        """The batch that the other trainer gets: with what is asked for, where all its models take that."""
        if not isinstance(asked, str) and isinstance(inputs.get("input_ids"), Tensor):
            _check_rows(type(self).__name__, len(asked), len(inputs["input_ids"]))
        batch = dict(inputs) | {TASK_COLUMN: asked}
        if getattr(self, "ref_model", None) is not None:
            del batch[TASK_COLUMN]
        return batch

    def _tasks_of_batch_in_force(self, inputs: Any, model: nn.Module) -> AbstractContextManager[None]:
        # Trainers that generate get rows here, and make the batch of them themselves.
        if not isinstance(inputs, Mapping) or TASK_COLUMN not in inputs:
            return nullcontext()
        return self._tasks_in_force(self._asked(inputs[TASK_COLUMN], model))

    @contextmanager
    def _tasks_in_force(self, asked: Tensor | str) -> Iterator[None]:
        """Set the tasks of calls that pass none, of the model and of those that it is compared with."""
        with ExitStack() as stack:
            stack.enter_context(use_tasks(self._model, asked))
            for name in ("ref_model", "teacher_model"):
                other = getattr(self, name, None)
                if isinstance(other, nn.Module) and any(
                    isinstance(part, HyperAdapterModel) for part in other.modules()
                ):
                    # By name, since its tasks may be in another order.
                    names = asked if isinstance(asked, str) else [self.task_names[task] for task in asked.tolist()]
                    stack.enter_context(use_tasks(other, names))
            yield


def is_sequential(trainer: Trainer, args: Any) -> bool:
    """Whether rows are trained on in the order of the data set, as TRL's KTO needs it, which pairs them before."""
    return _strategy(args) == "sequential" and is_trl(trainer, "KTOTrainer")


def check_arguments(trainer: RowTasksMixin, args: Any) -> None:
    """Refuse arguments under which batches would not be drawn by task, or rows lose theirs."""
    if _strategy(args) != "random" and not is_sequential(trainer, args):
        raise ValueError(
            f"train_sampling_strategy={_strategy(args)!r} cannot be followed: batches are drawn by task. Leave it at "
            "'random'."
        )
    if getattr(args, "auto_find_batch_size", False) and (trainer.max_tasks_per_batch or 1) > 1:
        raise ValueError(
            f"auto_find_batch_size=True may find a batch size that max_tasks_per_batch={trainer.max_tasks_per_batch} "
            "does not divide. Leave one of the two out, or set max_tasks_per_batch=1."
        )
    for name, reason in _WITHOUT_TASKS.items():
        if getattr(args, name, False):
            raise ValueError(
                f"{name}=True cannot be followed: {reason}. Leave it at False, or train one task at a time, pinned "
                "with set_task, without TaskTrainerMixin."
            )


def _check_rows(trainer: str, num_tasks: int, num_rows: int) -> None:
    if num_rows != num_tasks:
        raise ValueError(
            f"Got tasks for {num_tasks} rows, but the batch has {num_rows}: how {trainer} arranges rows is not known "
            "here. Make one-task batches with max_tasks_per_batch=1, turn off what joins rows (padding_free), or pass "
            "data_collator=TaskCollator(collator, blocks=2) if a batch holds all rows twice, one after another."
        )


def _blocks_of(trainer: Trainer) -> int:
    return next((blocks for name, blocks in _BLOCKS.items() if is_trl(trainer, name)), 1)


def is_trl(trainer: Trainer, name: str) -> bool:
    """Whether a trainer is of a class of TRL, or extends it."""
    return any(kind.__name__ == name and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)


def _strategy(args: Any) -> str:
    strategy: str = getattr(args, "train_sampling_strategy", "random")
    return strategy
