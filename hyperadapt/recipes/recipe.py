"""Recipes: a YAML file that says what to train on what, as checked dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.label_fields import Labels
from hyperadapt.files import write_whole
from hyperadapt.recipes.schema import SPLITS, read_fields
from hyperadapt.recipes.yaml_lines import Problem, YamlFile, dump_yaml
from hyperadapt.trainer.batches import TaskSampler

_BATCH_SIZE = 32


class RecipeError(ValueError):
    """What is wrong with a recipe: all problems of the file, in lines of the form ``first.yaml:12: what``.

    Args:
        path: The file.
        problems: The problems.
    """

    def __init__(self, path: str | os.PathLike[str], problems: Sequence[Problem]) -> None:
        self.path = Path(path)
        self.problems = sorted(problems)
        self.line = self.problems[0].line
        super().__init__("\n".join(f"{self.path}:{problem.line}: {problem.message}" for problem in self.problems))


@dataclass(frozen=True)
class TaskRecipe:
    """One task of a recipe.

    Args:
        description: What the task is, one text or several.
        train: File with the rows to train on, or a split of `dataset`, such as ``"train[:2000]"``; None only for a task
            that was added after training.
        validation: Likewise, the rows to choose a checkpoint by.
        test: Likewise, the rows to report on.
        dataset: What ``datasets.load_dataset`` takes: a name on the Hub or a folder.
        name: Name of a configuration of `dataset`.
        revision: Revision of `dataset` on the Hub.
        text: Column with the text to classify.
        text_pair: Column with a second text.
        label: Column with the label.
        labels: Names of the labels, which integers in the column count from 0.
        prompt: Column with the prompt: a text, or a list of chat messages.
        completion: Column with the answer to it, likewise.
        messages: Column with whole chats, for rows without the two: their last message, the assistant's, is the answer.
    """

    description: str | tuple[str, ...] | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True)
class Recipe:
    """What to train on what. Made by ``load_recipe``, which checks the fields.

    Args:
        base_model: Name of the base model on the Hub, or its folder.
        output_dir: Folder to write to, relative to the working directory.
        adapter: Fields of ``HyperAdapterConfig``, without the tasks.
        tasks: Name -> task; the order gives the task ids.
        revision: Revision of a base model on the Hub.
        dtype: Of the base model's weights; None takes that of its file.
        max_length: Tokens of a row at most.
        max_rows: Split -> rows per task at most, drawn at random (always the same ones).
        trainer: Arguments of ``HyperAdapterTrainer`` on tasks and logs.
        training: Fields of ``TrainingArguments``.
        card: For the model card: ``title``, ``base_model`` (its name on the Hub, where it is loaded from a folder),
            ``license``, ``language``, ``limits`` (sentences on what the adapter cannot do), ``tags`` and
            ``show_inputs`` (whether record and card show an input of each task).
    """

    base_model: str
    output_dir: str
    adapter: Mapping[str, Any]
    tasks: Mapping[str, TaskRecipe]
    revision: str | None = None
    dtype: str | None = None
    max_length: int = 128
    max_rows: Mapping[str, int] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task_type(self) -> str:
        """``"SEQ_CLS"`` or ``"CAUSAL_LM"``."""
        return str(self.adapter["task_type"])

    @property
    def adapter_config(self) -> HyperAdapterConfig:
        """A new configuration with the tasks, their descriptions, and the labels of a classifier's that are known."""
        given = {name: task.description for name, task in self.tasks.items() if task.description}
        descriptions = {name: text if isinstance(text, str) else list(text) for name, text in given.items()}
        labels: dict[str, Labels] = {name: self.outputs_of(name) for name in self.tasks if self.tasks[name].labels}
        return HyperAdapterConfig(
            **self.adapter,
            tasks=list(self.tasks),
            task_descriptions=descriptions or None,
            task_labels=labels if labels and self.adapter.get("task_type") == "SEQ_CLS" else None,
        )

    def outputs_of(self, task: str) -> dict[int, str]:
        """Output of the classifier -> label, of a task.

        Args:
            task: Name of the task.

        Returns:
            The labels that the recipe or the data name, by their places in ``labels``.
        """
        known = self.labels
        return {known.index(label): label for label in self.tasks[task].labels or ()}

    @property
    def shows_inputs(self) -> bool:
        """Whether record and card show an input of each task."""
        return bool(self.card.get("show_inputs", True))

    @property
    def labels(self) -> list[str]:
        """All tasks' label names, in the order of the classifier's outputs: a name that tasks share is one output."""
        return list(dict.fromkeys(label for task in self.tasks.values() for label in task.labels or ()))

    @property
    def _has_validation(self) -> bool:
        return bool(self.tasks) and all(task.validation for task in self.tasks.values())

    def training_arguments(self, folder: str | os.PathLike[str]) -> TrainingArguments:
        """The recipe's arguments; where it is silent, those of a short multi-task run.

        If every task has a validation split, that is evaluated five times, and the best checkpoint is kept: the one
        with the best mean over tasks, of the accuracy or, for language models, of the loss.

        Args:
            folder: Where checkpoints go.

        Returns:
            The arguments.

        Raises:
            ValueError: If there are several processes, or a value is wrong.
        """
        # TrainingArguments would wait for the others.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Recipes are trained in one process. For several, use HyperAdapterTrainer in a script.")
        given = self.training
        eval_strategy = given.get("eval_strategy", "steps" if self._has_validation else "no")
        save_strategy = given.get("save_strategy", "steps" if eval_strategy == "no" else eval_strategy)
        # Numbers below 1 are shares of all steps.
        eval_steps = given.get("eval_steps", 0.2)
        defaults = {
            "learning_rate": 2e-3,
            "per_device_train_batch_size": _BATCH_SIZE,
            "per_device_eval_batch_size": 64,
            "warmup_steps": 1 / 16,
            "eval_strategy": eval_strategy,
            "eval_steps": eval_steps if eval_strategy == "steps" else None,
            "save_strategy": save_strategy,
            "save_steps": eval_steps,
            "save_total_limit": 2,
            "logging_steps": 0.1,
            "load_best_model_at_end": eval_strategy != "no" and save_strategy in (eval_strategy, "best"),
            "metric_for_best_model": "mean_loss" if self.adapter.get("task_type") == "CAUSAL_LM" else "mean_accuracy",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "label_names": ["labels"],
            "report_to": "none",
            "seed": 0,
        }
        return TrainingArguments(**defaults | dict(given), output_dir=os.fspath(folder))

    def save(self, path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> None:
        """Write the recipe as YAML, complete or not at all.

        Folders and files are written relative to the new file's folder, unless they share none with it.

        Args:
            path: The file.
            folder: The folder that the file will be in, where it is written elsewhere first.
        """
        path = Path(path)
        folder = Path(path.parent if folder is None else folder).resolve()
        fields = _relative(vars(self), ["base_model"], folder)
        fields["adapter"] = _relative(self.adapter, ["text_encoder"], folder)
        tasks, defaults = {}, vars(TaskRecipe())
        for name, task in self.tasks.items():
            given = {key: value for key, value in vars(task).items() if value != defaults[key]}
            tasks[name] = _relative(given, ["dataset", *SPLITS], folder)
        fields["tasks"] = tasks
        write_whole(path, dump_yaml(fields))


def load_recipe(
    path: str | os.PathLike[str], *, output_dir: str | os.PathLike[str] | None = None, to_train: bool = True
) -> Recipe:
    """Read a recipe and check all of its fields.

    Args:
        path: The YAML file.
        output_dir: Folder to write to, instead of the recipe's.
        to_train: Whether to check also what training needs: the data's files and the fields of ``HyperAdapterConfig``
            and ``TrainingArguments``, which depend on the machine.

    Returns:
        The recipe, with absolute paths.

    Raises:
        RecipeError: If anything is wrong; it tells all problems with their lines.
    """
    path = Path(path)
    file = read_yaml(path)
    if output_dir is not None and isinstance(file.data, dict):
        file.data["output_dir"] = os.fspath(output_dir)
    fields = read_fields(file, path.resolve().parent, to_train)
    tasks = {name: TaskRecipe(**task) for name, task in fields.pop("tasks").items()}
    # Where a field is missing there is a problem: then this only serves to look for others.
    recipe = Recipe(**{"base_model": "", "output_dir": "", **fields, "tasks": tasks})
    if to_train:
        _check_together(file, recipe)
    if file.problems:
        raise RecipeError(path, file.problems)
    return recipe


def read_yaml(path: Path) -> YamlFile:
    """A YAML file that can be read at all."""
    try:
        file = YamlFile(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(path, [Problem(line, f"The file is not in UTF-8 ({error}). Save it as UTF-8.")]) from None
    if file.data is None:
        raise RecipeError(path, file.problems)
    return file


def _check_together(file: YamlFile, recipe: Recipe) -> None:
    """Add what the objects that training makes of the fields say of them."""
    if recipe.tasks:
        _add_complaints(file, "adapter", recipe, lambda given: given.adapter_config)
    eval_strategy = recipe.training.get("eval_strategy", "no")
    if not recipe._has_validation and eval_strategy != "no":
        file.refuse(
            ("training", "eval_strategy"),
            f"training.eval_strategy={shown(eval_strategy)} needs a validation split of every task.",
        )
    _check_metric(file, recipe)
    _add_complaints(file, "training", recipe, lambda given: given.training_arguments("checkpoints"))
    _add_complaints(file, "trainer", recipe, _sampler)


def _check_metric(file: YamlFile, recipe: Recipe) -> None:
    """Add a problem if what is to choose the checkpoint is not measured, which the trainer finds out late."""
    measures = ["loss"] if recipe.adapter.get("task_type") == "CAUSAL_LM" else ["accuracy", "loss"]
    known = [f"{name}_{measure}" for name in ("mean", *recipe.tasks) for measure in measures]
    metric = recipe.training.get("metric_for_best_model", "mean_loss")
    if metric.removeprefix("eval_") not in known:
        file.refuse(
            ("training", "metric_for_best_model"),
            f"training.metric_for_best_model={shown(metric)} is not measured. Choose one of {shown(known)}.",
        )


def _sampler(recipe: Recipe) -> TaskSampler:
    options = {name: value for name, value in recipe.trainer.items() if not name.startswith("log_")}
    return TaskSampler([0], recipe.training.get("per_device_train_batch_size", _BATCH_SIZE), **options)


def _add_complaints(file: YamlFile, section: str, recipe: Recipe, construct: Callable[[Recipe], object]) -> None:
    """Add what a constructor says of a section's fields, leaving out one wrong field after another."""
    given = getattr(recipe, section)
    left = dict(given)
    changed: dict[str, Any] = {section: left}
    while True:
        try:
            construct(replace(recipe, **changed))
        except (TypeError, ValueError, OverflowError, ImportError, NotImplementedError) as error:
            message = str(error)
        else:
            return
        # What it says of a field that was left out, it says only because of that.
        if any(re.search(rf"\b{name}\b", message) for name in given.keys() - left.keys()):
            return
        name = _blamed(message, left)
        is_named = name is not None and message.startswith(name)
        file.refuse((section, name) if name else (section,), f"{section}{'.' if is_named else ': '}{message}")
        if name is None:
            return
        del left[name]


def _blamed(message: str, given: Mapping[str, Any]) -> str | None:
    """The field that a message is about: named by it, or with a value that it shows."""
    named = [word for word in re.findall(r"\w+", message) if word in given]
    shown_at = {name: message.find(value) for name, value in given.items() if isinstance(value, str)}
    by_value = sorted((place, name) for name, place in shown_at.items() if place >= 0)
    return next(iter([*named, *(name for _, name in by_value)]), None)


def _relative(fields: Mapping[str, Any], names: Sequence[str], folder: Path) -> dict[str, Any]:
    """The fields that are given; of those with the names, absolute paths become relative to the folder."""
    given = {name: value for name, value in fields.items() if value not in (None, {})}
    for name in given.keys() & set(names):
        path = given[name]
        if os.path.isabs(path) and os.path.commonpath([path, folder]) != os.sep:
            given[name] = os.path.relpath(path, folder)
    return given
