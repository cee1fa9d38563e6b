"""What a training would do: all of it is read and checked, and nothing is trained or written."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hyperadapt.recipes.recipe import Recipe
from hyperadapt.runs.evaluation import split_dialogue
from hyperadapt.runs.folder import check_folder, is_finished
from hyperadapt.runs.training import Report, prepared, write_line
from hyperadapt.trainer.trainer import HyperAdapterTrainer
from hyperadapt.tuner.active import active_network


@dataclass(frozen=True)
class TaskPreview:
    """One task as the model would read it."""

    # Split -> number of rows.
    rows: Mapping[str, int]
    labels: Sequence[str]
    # Of all rows, in tokens; and how many rows are that long that they may have been cut.
    longest: int
    full: int
    # Part -> the text of its tokens, of the first row to train on: text and label, or prompt and completion.
    example: Mapping[str, str]


@dataclass(frozen=True)
class Preview:
    """What a training would do."""

    folder: str
    base_model: str
    task_type: str
    tasks: Mapping[str, TaskPreview]
    positions: Sequence[str]
    trainable_parameters: int
    parameters: int
    steps: int
    batch_size: int
    max_length: int

    @property
    def modules(self) -> str:
        """How many modules of which name are adapted, in words."""
        counts = Counter(name.rpartition(".")[2] for name in self.positions)
        return ", ".join(f"{count} x {name}" for name, count in counts.items())


def preview(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, report: Report | None = write_line
) -> Preview:
    """Read and check all that ``train`` would with the same arguments, the base model included."""
    if not (resume and is_finished(Path(recipe.output_dir))):
        check_folder(Path(recipe.output_dir), recipe, resume=resume, overwrite=overwrite)
    # A trainer makes the folder for its checkpoints.
    with tempfile.TemporaryDirectory() as checkpoints:
        labelled, tokenizer, data, trainer, _ = prepared(recipe, Path(checkpoints), report)
    model: Any = trainer.model
    trainable, total = model.get_nb_trainable_parameters()
    by_task = {name: {split: rows[name] for split, rows in data.items() if name in rows} for name in labelled.tasks}
    return Preview(
        folder=recipe.output_dir,
        base_model=recipe.base_model,
        task_type=recipe.task_type,
        tasks={name: _task_preview(labelled, name, rows, tokenizer) for name, rows in by_task.items()},
        positions=[position.name for position in active_network(model)[1].positions],
        trainable_parameters=trainable,
        parameters=total,
        steps=_steps(trainer),
        batch_size=trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        max_length=min(recipe.max_length, tokenizer.model_max_length),
    )


def _task_preview(
    recipe: Recipe, name: str, by_split: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> TaskPreview:
    lengths = [len(ids) for rows in by_split.values() for ids in rows["input_ids"]]
    most = min(recipe.max_length, tokenizer.model_max_length)
    return TaskPreview(
        rows={split: len(rows) for split, rows in by_split.items()},
        labels=recipe.tasks[name].labels or (),
        longest=max(lengths),
        full=sum(length >= most for length in lengths),
        example=_example(recipe, by_split["train"][0], tokenizer),
    )


def _example(recipe: Recipe, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The parts of a tokenised row as text, special tokens included."""
    if recipe.task_type == "CAUSAL_LM":
        prompt, completion = split_dialogue(row)
        return {"prompt": str(tokenizer.decode(prompt)), "completion": str(tokenizer.decode(completion))}
    return {"text": str(tokenizer.decode(row["input_ids"])), "label": recipe.labels[row["labels"]]}


def _steps(trainer: HyperAdapterTrainer) -> int:
    arguments = trainer.args
    if arguments.max_steps > 0:
        return arguments.max_steps
    of_an_epoch = math.ceil(len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * of_an_epoch)
