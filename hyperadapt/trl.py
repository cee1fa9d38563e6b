"""TRL's trainers for many tasks, ready made. Importing this imports TRL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainingArguments

from hyperadapt.config.checks import shown
from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.trainer.checkpoints import WholeCheckpointsMixin
from hyperadapt.trainer.datasets import has_texts_and_chats
from hyperadapt.trainer.rewards import reward_functions
from hyperadapt.trainer.trainer import TaskTrainerMixin, task_names_of

try:
    import trl
    from trl.chat_template_utils import parse_response
except ImportError as error:
    raise ImportError(
        f"hyperadapt.trl needs TRL, which could not be imported ({error}). Install it: pip install 'hyperadapt[trl]'."
    ) from error

__all__ = [
    "MultiTaskDPOTrainer",
    "MultiTaskGRPOTrainer",
    "MultiTaskKTOTrainer",
    "MultiTaskRewardTrainer",
    "MultiTaskSFTTrainer",
]


class _MultiTaskTrainer(TaskTrainerMixin, WholeCheckpointsMixin):
    """What the trainers below share."""

    _config: ClassVar[type]

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None and not isinstance(args, self._config):
            raise TypeError(
                f"args is of type {type(args).__name__}, but {type(self).__name__} takes a {self._config.__name__}."
            )
        super().__init__(model, args, *rest, **kwargs)


class MultiTaskSFTTrainer(_MultiTaskTrainer, trl.SFTTrainer):
    """TRL's ``SFTTrainer`` for many tasks, with the arguments of both it and ``TaskTrainerMixin``.

    Texts and chats, prompts with completions and rows without: each task is tokenised by itself, as TRL does it for
    that task alone. So is packing, which joins rows of one task.
    """

    # TRL takes these, too.
    _config = TrainingArguments


class MultiTaskRewardTrainer(_MultiTaskTrainer, trl.RewardTrainer):
    """TRL's ``RewardTrainer`` for many tasks, with the arguments of both it and ``TaskTrainerMixin``.

    All tasks share the head that gives the reward; what it reads is each task's own.
    """

    _config = trl.RewardConfig


class MultiTaskDPOTrainer(_MultiTaskTrainer, trl.DPOTrainer):
    """TRL's ``DPOTrainer`` for many tasks.

    Without `ref_model`, the reference is this model with its hyperadapter off, or, if that was trained before, with a
    copy of it, an adapter called ``ref``: each row is compared with its own task at the start.

    Args:
        model: As in TRL, with a hyperadapter or with a ``HyperAdapterConfig`` as `peft_config`.
        ref_model: As in TRL; one with a hyperadapter uses its tasks of the same names.
        args: As in TRL.
        data_collator: As in TRL.
        train_dataset: Task name -> its rows, or one data set with a column ``tasks``; tasks may be texts or chats.
        eval_dataset: Likewise.
        **kwargs: As in TRL and in ``TaskTrainerMixin``.

    Raises:
        TypeError: If the model has no hyperadapter, or `args` or a data set is of another type.
        ValueError: If a task is unknown, none of its rows is left after tokenising, or the arguments lose tasks.
    """

    _config = trl.DPOConfig

    def __init__(  # noqa: DOC502
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, ref_model=ref_model, **kwargs)


class MultiTaskKTOTrainer(_MultiTaskTrainer, trl.KTOTrainer):
    """TRL's ``KTOTrainer`` for many tasks.

    Its estimate of the divergence pairs prompts with completions of other rows: here of the same task. It is a mean
    over the batch; with ``max_tasks_per_batch=1`` over one task. Pairs are made before, so all epochs have one order.

    Args:
        model: As in TRL, with a hyperadapter or with a ``HyperAdapterConfig`` as `peft_config`.
        ref_model: As in ``MultiTaskDPOTrainer``.
        args: As in TRL.
        data_collator: As in TRL.
        train_dataset: Task name -> its rows, or one data set with a column ``tasks``; tasks may be texts or chats.
        eval_dataset: Likewise.
        **kwargs: As in TRL and in ``TaskTrainerMixin``.

    Raises:
        TypeError: If the model has no hyperadapter, or `args` or a data set is of another type.
        ValueError: If a task is unknown, none of its rows is left after tokenising, or the arguments lose tasks.
    """

    _config = trl.KTOConfig

    def __init__(  # noqa: DOC502
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, ref_model=ref_model, **kwargs)


class MultiTaskGRPOTrainer(_MultiTaskTrainer, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` for many tasks: completions are generated with the task of their prompt.

    Logs have the rewards of each task, ``reward_<task>``. A run that is resumed between two generations goes on with
    the completions that it had.

    Args:
        model: As in TRL, with a hyperadapter or with a ``HyperAdapterConfig`` as `peft_config`.
        reward_funcs: As in TRL, where functions get the ids of tasks as `tasks`; or task name -> its function or
            functions, which then get the rows of that task alone.
        args: As in TRL.
        train_dataset: Task name -> its prompts, or one data set with a column ``tasks``; tasks may be texts or chats.
        eval_dataset: Likewise.
        **kwargs: As in TRL and in ``TaskTrainerMixin``.

    Raises:
        TypeError: If the model has no hyperadapter, or `args`, a data set or a reward function is of another type.
        ValueError: If a task is unknown or has no reward function, texts and chats are mixed where that cannot be
            followed, or the arguments lose tasks.
    """

    _config = trl.GRPOConfig
    _mixes_prompts = True

    def __init__(  # noqa: DOC502, DOC503
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        by_task = train_dataset if isinstance(train_dataset, Mapping) else {}
        if isinstance(reward_funcs, Mapping):
            names = task_names_of(model, kwargs.get("peft_config"))
            reward_funcs = reward_functions(reward_funcs, names, _trained(train_dataset, names))
        elif has_texts_and_chats(by_task):
            _check_reads_both(reward_funcs)
        if has_texts_and_chats(by_task) and (kwargs.get("tools") or kwargs.get("environment_factory")):
            raise ValueError(
                "tools and environments need chats, but some of the tasks have texts as prompts. Write these as "
                "[{'role': 'user', 'content': text}]."
            )
        if has_texts_and_chats(by_task) and getattr(args, "log_completions", False):
            raise ValueError(
                "log_completions=True makes one table of all prompts, but some of the tasks have texts as prompts and "
                "others chats. Leave it out, or give all tasks prompts of one form."
            )
        super().__init__(model, args, None, train_dataset, eval_dataset, reward_funcs=reward_funcs, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        tokenize = super()._tokenize_prompts
        if not _are_mixed(prompts):
            return tokenize(prompts)
        ids = {
            kind: iter(tokenize([prompt for prompt in prompts if isinstance(prompt, kind)])[0]) for kind in (str, list)
        }
        return [next(ids[type(prompt)]) for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        if not _are_mixed(prompts):
            return generated
        prompt_ids, completion_ids, mask, _, *rest = generated
        # TRL makes all of them what the first is.
        completions = [self._completion(*row) for row in zip(prompts, prompt_ids, completion_ids, strict=True)]
        return prompt_ids, completion_ids, mask, completions, *rest

    def _completion(self, prompt: Any, prompt_ids: list[int], ids: list[int]) -> Any:
        """A completion in the form of its prompt."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(prompt, str):
            return text
        kinds = ("response_template", "response_schema")
        if all(getattr(self._tokenizer, kind, None) is None for kind in kinds):
            return [{"role": "assistant", "content": text}]
        return [parse_response(self._tokenizer, ids, prefix=prompt_ids)]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        steps: int = self.args.steps_per_generation  # type: ignore[attr-defined]
        if self._step % (steps * self.num_iterations):
            state = {"step": self._step, "inputs": self._buffered_inputs}
            torch.save(state, self._generation_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.isfile(self._generation_file(checkpoint)):
            state = torch.load(self._generation_file(checkpoint), map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["inputs"]

    def _generation_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"generation_{self.args.process_index}.pth")


def _trained(dataset: Any, tasks: Sequence[str]) -> list[str]:
    """The tasks that training data has rows of."""
    if isinstance(dataset, Mapping):
        return list(dataset)
    ids = set(dataset.with_format(None)[TASK_COLUMN]) if TASK_COLUMN in getattr(dataset, "column_names", ()) else set()
    return [task for index, task in enumerate(tasks) if index in ids]


def _are_mixed(prompts: Sequence[Any]) -> bool:
    return len({type(prompt) for prompt in prompts}) > 1


def _check_reads_both(reward_funcs: Any) -> None:
    """Refuse reward models, for which TRL writes all rows as it writes the first."""
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(function, str | nn.Module):
            raise ValueError(
                f"The reward model {shown(function)} cannot score a batch of texts and chats. Give all tasks prompts "
                "of one form, or call the model from a function."
            )
