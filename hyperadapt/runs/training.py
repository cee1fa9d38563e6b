"""Training of a run: its data, its trainer, and what it reports."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
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
    set_seed,
)

from hyperadapt.diagnosis import Diagnosis, measure
from hyperadapt.recipes.base_models import load_base, load_tokenizer, quiet_loading
from hyperadapt.recipes.recipe import Recipe
from hyperadapt.recipes.rows import read_rows
from hyperadapt.recipes.tokens import collator
from hyperadapt.runs.evaluation import evaluate, evaluate_rows, no_better_lines, tokenize
from hyperadapt.runs.folder import CHECKPOINTS, begin, check_folder, is_finished, last_checkpoint
from hyperadapt.runs.record import TOLD, Record, hardware, prompt_of, versions
from hyperadapt.runs.report import write_report
from hyperadapt.runs.run import Run, load_run, write_run
from hyperadapt.trainer.trainer import HyperAdapterTrainer

Data = Mapping[str, Mapping[str, Dataset]]
Report = Callable[[str], None]
_SHOWN_TASKS = 6


def write_line(text: str) -> None:
    """Write a line to the standard error, past a progress bar."""
    tqdm.write(text, file=sys.stderr)


def train(  # noqa: DOC502
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    figures: bool = True,
    report: Report | None = write_line,
) -> Run:
    """Train as a recipe says, evaluate, and write adapter, tokenizer, recipe, record and card.

    Evaluated is the test split of the tasks that have one; if none has, the validation split, or else the rows that
    were trained on. Checkpoints are removed in the end, unless the recipe sets ``save_total_limit``.

    Args:
        recipe: The recipe, whose `output_dir` is written to.
        resume: Whether to go on with an unfinished run in the folder. A finished one is loaded as it is, and evaluated
            if that was not done.
        overwrite: Whether to replace a run in the folder.
        figures: Whether to draw pictures for the card, if matplotlib is installed.
        report: Gets a line of text for each stage and log, and in the end for each task that is no better than its
            most frequent answer; None for no lines and no bars.

    Returns:
        The run, with the trained model where the training left it.

    Raises:
        ValueError: If the folder holds anything else, data are wrong, or the training diverged: then its checkpoints
            stay.
    """
    started, folder = time.monotonic(), Path(recipe.output_dir)
    say = report or (lambda line: None)
    if resume and is_finished(folder):
        run = load_run(folder)
        if run.record.results:
            return run
        # The training ended, and the evaluation did not.
        split = next(split for split in TOLD if any(getattr(task, split) for task in run.recipe.tasks.values()))
        batch_size = recipe.training_arguments(folder / CHECKPOINTS).per_device_eval_batch_size
        with quiet_loading() if report is None else nullcontext():
            results = evaluate(run, split, batch_size=batch_size)
        return _reported(run, results, measure(run.model), say, figures)
    check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    checkpoint = last_checkpoint(folder) if resume else None
    labelled, tokenizer, data, trainer, prompts = prepared(recipe, folder / CHECKPOINTS, report)
    model: Any = trainer.model
    begin(folder, recipe, checkpoint)
    say(f"training on {sum(map(len, data['train'].values()))} rows")
    trainer.train(resume_from_checkpoint=checkpoint)
    facts, history = training_facts(trainer, data), trainer.state.log_history
    facts["seconds"] = round(time.monotonic() - started)
    run = Run(model.eval(), tokenizer, labelled, Record(facts, {}, history, prompts), folder)
    # It refuses what diverged.
    diagnosis = measure(run.model)
    # Now, so that what goes wrong with the evaluation costs no training.
    write_run(run, folder)
    split = next(split for split in TOLD if data[split])
    with quiet_loading() if report is None else nullcontext():
        results = evaluate_rows(run, split, data[split], trainer.args.per_device_eval_batch_size)
    return _reported(run, results, diagnosis, say, figures)


def _reported(run: Run, results: dict[str, Any], diagnosis: Diagnosis, say: Report, figures: bool) -> Run:
    """A run with its first results, in its record and card, without the checkpoints that its recipe does not keep."""
    for line in no_better_lines(results):
        say(line)
    run = replace(run, record=run.record.with_results(results))
    run.record.save(run.folder)
    write_report(run.model, run.recipe, run.record, run.folder, diagnosis, figures=figures)
    if "save_total_limit" not in run.recipe.training:
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    return run


class Prepared(NamedTuple):
    """All that a training needs, read and checked."""

    # With the labels of all tasks.
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Data
    trainer: HyperAdapterTrainer
    # Task -> its first input, for the card.
    prompts: Mapping[str, Any]


def prepared(recipe: Recipe, checkpoints: Path, report: Report | None) -> Prepared:
    """Read and check all that a training of the recipe needs."""
    say = report or (lambda line: None)
    with quiet_loading():
        tokenizer = load_tokenizer(recipe)
    say(f"reading the data of {len(recipe.tasks)} tasks")
    labelled, data, prompts = read_data(recipe, tokenizer)
    arguments = recipe.training_arguments(checkpoints)
    set_seed(arguments.seed)
    say(f"loading the base model {recipe.base_model}")
    with quiet_loading():
        base = load_base(labelled, tokenizer)
    model = get_peft_model(base, labelled.adapter_config, revision=recipe.revision)
    trainer = make_trainer(model, tokenizer, labelled, arguments, data, report)
    return Prepared(labelled, tokenizer, data, trainer, prompts)


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Recipe, Data, dict[str, Any]]:
    """The recipe with all labels; split -> task -> tokenised rows, where a task has the split; and task -> first input.

    All splits are read, so that wrong rows for the evaluation in the end are found before the training.
    """
    rows = {"train": {name: read_rows(recipe, name, "train") for name in recipe.tasks}}
    tasks = {name: replace(task, labels=rows["train"][name].names or None) for name, task in recipe.tasks.items()}
    recipe = replace(recipe, tasks=tasks)
    for split in ("validation", "test"):
        rows[split] = {name: read_rows(recipe, name, split) for name, task in tasks.items() if getattr(task, split)}
    data = {
        split: {name: tokenize(one, recipe, tokenizer) for name, one in by_task.items()}
        for split, by_task in rows.items()
    }
    shown = rows["train"] if recipe.shows_inputs else {}
    return recipe, data, {name: prompt_of(one, recipe.task_type) for name, one in shown.items()}


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    arguments: TrainingArguments,
    data: Data,
    report: Report | None,
) -> HyperAdapterTrainer:
    """The trainer of a run; `recipe` has the labels of all tasks."""
    count = sum(map(len, data["train"].values()))
    if arguments.dataloader_drop_last and count < arguments.train_batch_size:
        raise ValueError(
            f"training.dataloader_drop_last=True drops all of the {count} rows to train on, which fill no batch of "
            f"{arguments.train_batch_size}. Leave it out, or lower per_device_train_batch_size."
        )
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
        trainer.add_callback(_Progress(report, trainer.task_names))
    return trainer


def training_facts(trainer: HyperAdapterTrainer, data: Data) -> dict[str, Any]:
    """What to record of a finished training: fact -> value."""
    arguments, state = trainer.args, trainer.state
    model: Any = trainer.model
    trainable, total = model.get_nb_trainable_parameters()
    best: dict[str, Any] = {}
    if state.best_global_step is not None:
        best = {"best_step": state.best_global_step, "chosen_by": arguments.metric_for_best_model}
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
    """The usual bars, and a line for each log that people can read."""

    def __init__(self, report: Report, tasks: Sequence[str]) -> None:
        super().__init__()
        self.report, self.tasks = report, tasks

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        names = {"loss": "loss", "eval_mean_accuracy": "validation accuracy", "eval_mean_loss": "validation loss"}
        values = [f"{name} {logs[key]:.4g}" for key, name in names.items() if key in logs]
        if values:
            by_task = _by_task(logs, self.tasks) if "loss" in logs else ""
            self.report(f"step {state.global_step} of {state.max_steps}: {', '.join(values)}{by_task}")


def _by_task(logs: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """The training losses of tasks, of many the highest ones, in brackets; nothing for one task."""
    losses = {name: logs[f"loss_{name}"] for name in tasks if f"loss_{name}" in logs}
    if len(losses) < 2:
        return ""
    # A loss that is not a number is the worst.
    chosen = sorted(losses, key=lambda name: float(np.nan_to_num(losses[name], nan=np.inf)))[-_SHOWN_TASKS:]
    shown = ", ".join(f"{name} {losses[name]:.4g}" for name in losses if name in chosen)
    return f" ({shown})" if len(chosen) == len(losses) else f" (highest of {len(losses)} tasks: {shown})"


def _own_labels(recipe: Recipe) -> Tensor:
    labels = recipe.labels
    return torch.tensor([[label in (task.labels or ()) for label in labels] for task in recipe.tasks.values()])


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}
