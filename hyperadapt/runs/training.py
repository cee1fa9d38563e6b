"""What a training run is made of: its folder, its trainer, and what it reports."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hyperadapt.config.checks import shown
from hyperadapt.files import UNFINISHED
from hyperadapt.recipes.recipe import Recipe, load_recipe
from hyperadapt.recipes.rows import read_rows
from hyperadapt.recipes.tokens import collator, tokenized
from hyperadapt.runs.record import RECIPE, RECORD, hardware, versions
from hyperadapt.trainer.trainer import HyperAdapterTrainer

CHECKPOINTS = "checkpoints"
Data = Mapping[str, Mapping[str, Dataset]]
Report = Callable[[str], None]


def write_line(text: str) -> None:
    """Write a line to the standard error, past a progress bar.

    Args:
        text: The line.
    """
    tqdm.write(text, file=sys.stderr)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run.

    Args:
        folder: The folder.

    Returns:
        Whether it has a record.
    """
    return (folder / RECORD).exists()


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> str | None:
    """Check that a run may write to a folder; what others wrote is never replaced.

    Args:
        folder: The folder.
        recipe: The recipe.
        resume: Whether an unfinished run may be resumed.
        overwrite: Whether a run may be replaced.

    Returns:
        The checkpoint to go on from, or None.

    Raises:
        ValueError: If the folder holds anything that was not to be expected, or the unfinished run another recipe.
    """
    shown_folder = f"output_dir={str(folder)!r}"
    if resume and overwrite:
        raise ValueError(f"{shown_folder} can be resumed or overwritten, not both. Ask for one of the two.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{shown_folder} is a file. Name a folder.")
    begun = folder / CHECKPOINTS / RECIPE
    if is_finished(folder):
        if not overwrite:
            raise ValueError(f"{shown_folder} holds a finished run. Name another folder, or ask to overwrite it.")
    elif begun.exists():
        if not resume and not overwrite:
            raise ValueError(f"{shown_folder} holds an unfinished run. Ask to resume or to overwrite it.")
    elif folder.exists():
        others = sorted(path.name for path in folder.iterdir() if not _is_remnant(path))
        if others:
            raise ValueError(f"{shown_folder} holds no run, but {shown(others)}. Name another folder, or empty it.")
    if not resume or not begun.exists():
        return None
    _check_same(load_recipe(begun, to_train=False), recipe, folder)
    checkpoint: str | None = get_last_checkpoint(str(folder / CHECKPOINTS))  # type: ignore[no-untyped-call]
    return checkpoint


def begin(folder: Path, recipe: Recipe, checkpoint: str | None) -> None:
    """Make the folder of a run's checkpoints, and keep the recipe there.

    Args:
        folder: The folder of the run.
        recipe: The recipe.
        checkpoint: The checkpoint to go on from; None removes those of an earlier run.
    """
    checkpoints = folder / CHECKPOINTS
    if checkpoint is None and checkpoints.exists():
        shutil.rmtree(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    recipe.save(checkpoints / RECIPE)


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Recipe, Data]:  # noqa: DOC502
    """Read all data, and find the tasks' labels.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer.

    Returns:
        The recipe with the labels of all tasks; and split -> task -> tokenised rows, of all splits that the tasks have:
        those for the evaluation in the end are wrong before the training rather than after it.

    Raises:
        ValueError: If data cannot be read or are wrong.
    """
    rows = {"train": {name: read_rows(recipe, name, "train") for name in recipe.tasks}}
    tasks = {name: replace(task, labels=rows["train"][name].names or None) for name, task in recipe.tasks.items()}
    recipe = replace(recipe, tasks=tasks)
    for split in ("validation", "test"):
        rows[split] = {name: read_rows(recipe, name, split) for name, task in tasks.items() if getattr(task, split)}
    options: dict[str, Any] = {
        "task_type": recipe.task_type,
        "labels": recipe.labels,
        "max_length": recipe.max_length,
    }
    data = {
        split: {name: tokenized(one, tokenizer, **options) for name, one in by_task.items()}
        for split, by_task in rows.items()
    }
    return recipe, data


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    arguments: TrainingArguments,
    data: Data,
    report: Report | None,
) -> HyperAdapterTrainer:
    """Make the trainer of a run.

    Args:
        model: The model with the adapter.
        tokenizer: The tokenizer.
        recipe: The recipe, with the labels of all tasks.
        arguments: Its training arguments.
        data: Split -> task -> tokenised rows.
        report: Gets a line for each log; None for no lines and no bars.

    Returns:
        The trainer.
    """
    is_classifier = recipe.task_type == "SEQ_CLS"
    trainer = _RecipeTrainer(
        model,
        arguments,
        collator(tokenizer, recipe.task_type),
        data["train"],
        data["validation"] if arguments.eval_strategy != "no" else None,
        compute_metrics=_accuracy if is_classifier else None,
        **recipe.trainer,
    )
    if is_classifier:
        trainer.own_labels = _own_labels(recipe)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if report is not None:
        trainer.add_callback(_Progress(report))
    return trainer


def training_facts(trainer: HyperAdapterTrainer, data: Data) -> dict[str, Any]:
    """What to record of a training.

    Args:
        trainer: The trainer, after training.
        data: Split -> task -> rows.

    Returns:
        Fact -> value.
    """
    arguments, state = trainer.args, trainer.state
    model: Any = trainer.model
    trainable, total = model.get_nb_trainable_parameters()
    best = {} if state.best_global_step is None else {"best_step": state.best_global_step}
    return {
        "steps": state.global_step,
        **best,
        "epochs": round(state.epoch or 0.0, 2),
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "rows": {task: len(dataset) for task, dataset in data["train"].items()},
        "trainable_parameters": trainable,
        "parameters": total,
        "hardware": hardware(arguments.device),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


class _RecipeTrainer(HyperAdapterTrainer):
    """With predicted labels, each among those of the row's own task, in place of logits."""

    # Whether a task (row) has a label (column); None for a language model.
    own_labels: Tensor | None = None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tasks = inputs["tasks"]
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if isinstance(logits, Tensor):
            if self.own_labels is None:
                # A language model's are large, and only the loss is used.
                return loss, None, None
            others = ~self.own_labels[tasks.cpu()].to(logits.device)
            logits = logits.masked_fill(others, -torch.inf).argmax(-1)
        return loss, logits, labels


class _Progress(ProgressCallback):
    """The usual bars, and a line for each log that people can read.

    Args:
        report: Gets the line.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        names = {"loss": "loss", "eval_mean_accuracy": "validation accuracy", "eval_mean_loss": "validation loss"}
        values = [f"{name} {logs[key]:.4g}" for key, name in names.items() if key in logs]
        if values:
            self.report(f"step {state.global_step} of {state.max_steps}: {', '.join(values)}")


def _own_labels(recipe: Recipe) -> Tensor:
    labels = recipe.labels
    return torch.tensor([[label in (task.labels or ()) for label in labels] for task in recipe.tasks.values()])


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def _is_remnant(path: Path) -> bool:
    """Whether a run that failed at its start, or was killed while it was saved, may have left this."""
    return path.name.startswith(UNFINISHED) or (path.is_dir() and not any(path.iterdir()))


def _check_same(begun: Recipe, recipe: Recipe, folder: Path) -> None:
    names = [field.name for field in fields(Recipe) if field.name != "output_dir"]
    changed = [name for name in names if getattr(begun, name) != getattr(recipe, name)]
    if changed:
        raise ValueError(
            f"The unfinished run in output_dir={str(folder)!r} was begun with another recipe: {', '.join(changed)} "
            "changed. Undo that, or ask to overwrite the run."
        )
