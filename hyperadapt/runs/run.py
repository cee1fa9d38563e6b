"""Runs: trained adapters, kept with recipe and record."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hyperadapt.config.checks import shown
from hyperadapt.diagnosis import measure
from hyperadapt.files import whole_folder
from hyperadapt.recipes.base_models import SAFELY, load_base, positions_of, quiet_loading
from hyperadapt.recipes.recipe import Recipe, TaskRecipe, load_recipe
from hyperadapt.runs.folder import RECIPE, find_folder
from hyperadapt.runs.record import RECORD, Record
from hyperadapt.runs.report import write_report
from hyperadapt.tuner.active import active_network, find_tuner

TOKENIZER_CONFIG = "tokenizer_config.json"
# Tokens of a row, where neither a recipe nor the model says how many there may be.
_LENGTH = 512
_AUTO_CLASSES = {
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
}


@dataclass
class Run:
    """A trained adapter with all that belongs to it.

    Args:
        model: The base model with the adapter, in evaluation mode.
        tokenizer: The tokenizer.
        recipe: The recipe, with the labels of all tasks.
        record: What the training did.
        folder: Where it was saved to, or loaded from.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    record: Record
    folder: Path


def load_run(  # noqa: DOC503
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Run:
    """Load a trained adapter, onto the accelerator if there is one.

    Args:
        source: Its folder, or its name on the Hub.
        revision: Revision on the Hub.
        token: Token for the Hub; None for the one that is logged in.

    Returns:
        The run.

    Raises:
        RecipeError: If its recipe is wrong, or the base model's folder is gone.
        ValueError: If the folder holds no run, or its recipe and its adapter have other tasks.
    """
    folder = find_folder(source, revision, token)
    record = Record.load(folder)
    recipe = load_recipe(folder / RECIPE, to_train=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
    with quiet_loading():
        model = PeftModel.from_pretrained(load_base(recipe, tokenizer), str(folder))
    tasks = active_network(model)[1].config.task_names
    if tasks != list(recipe.tasks):
        raise ValueError(
            f"{folder / RECIPE} names the tasks {shown(list(recipe.tasks))}, and the adapter beside it has "
            f"{shown(tasks)}, in this order: it was changed and saved without its run. Edit the file to match."
        )
    if active_network(model)[1].config.task_labels is None:
        # Saved before adapters kept them.
        for name, task in recipe.tasks.items():
            if task.labels:
                find_tuner(model).set_labels(name, recipe.outputs_of(name))
    return Run(_on_device(model), tokenizer, recipe, record, folder)


def _on_device(model: PeftModel) -> PeftModel:
    """A model in evaluation mode, on the accelerator if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).eval()


def load_model(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> PeftModel:
    """Load an adapter, whether or not a recipe lies beside it.

    Args:
        source: Its folder, or its name on the Hub.
        revision: Revision on the Hub.
        token: Token for the Hub; None for the one that is logged in.

    Returns:
        The model.

    Raises:
        ValueError: If the folder holds no adapter, or it does not say how to load its base model.
    """
    folder = find_folder(source, revision, token)
    if (folder / RECIPE).exists():
        return load_run(folder).model
    task_type = PeftConfig.from_pretrained(str(folder)).task_type
    if task_type not in _AUTO_CLASSES:
        raise ValueError(
            f"{source} has no {RECIPE}, which would say how to make its base model (task_type={task_type!r}). Load it "
            "in Python, with PeftModel.from_pretrained."
        )
    with quiet_loading():
        model: PeftModel = _AUTO_CLASSES[task_type].from_pretrained(str(folder), **SAFELY)
    return model.eval()


def load_for_prediction(source: str | os.PathLike[str], *, revision: str | None = None) -> Run:
    """As ``load_run``; of an adapter without a recipe as its own files tell, with the usual names of columns."""
    folder = find_folder(source, revision, None)
    if (folder / RECIPE).exists():
        return load_run(folder)
    task_type = PeftConfig.from_pretrained(str(folder)).task_type
    if task_type not in ("SEQ_CLS", "CAUSAL_LM"):
        raise ValueError(
            f"{source} is of task_type={task_type!r}, and rows are answered for 'SEQ_CLS' (classifiers) and "
            "'CAUSAL_LM' (language models) only. Call the model in Python."
        )
    model = load_model(folder)
    config = active_network(model)[1].config
    path = folder if (folder / TOKENIZER_CONFIG).exists() else config.base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path, **SAFELY)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    recipe = Recipe(
        base_model=str(config.base_model_name_or_path),
        output_dir=str(folder),
        adapter={"task_type": task_type},
        tasks={name: TaskRecipe(labels=tuple(config.labels_of(name).values()) or None) for name in config.task_names},
        max_length=positions_of(model.config) or _LENGTH,
    )
    return Run(_on_device(model), tokenizer, recipe, Record({}, {}, []), folder)


def load_record(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Record | None:
    """Load the record of an adapter.

    Args:
        source: Its folder, or its name on the Hub.
        revision: Revision on the Hub.
        token: Token for the Hub; None for the one that is logged in.

    Returns:
        The record, or None if there is none.
    """
    folder = find_folder(source, revision, token)
    return Record.load(folder) if (folder / RECORD).exists() else None


def save_run(run: Run, folder: str | os.PathLike[str], *, figures: bool = False) -> None:  # noqa: DOC502
    """Write adapter, tokenizer, recipe and record, all of them or nothing; and then the card.

    A card that is there and does not say that it may be rewritten keeps its text, and its metadata are completed.

    Args:
        run: The run.
        folder: The folder; made if missing, other files in it are left alone.
        figures: Whether to draw pictures for the card, if matplotlib is installed, in place of those in the folder.

    Raises:
        ValueError: If an update is not finite, as after a training that diverged; nothing is written then.
    """
    folder = Path(folder)
    diagnosis = measure(run.model)
    write_run(run, folder)
    # Apart, so that what goes wrong with a picture costs no training.
    write_report(run.model, run.recipe, run.record, folder, diagnosis, figures=figures)


def write_run(run: Run, folder: Path) -> None:
    """Write adapter, tokenizer, recipe and record, all of them or nothing."""
    with whole_folder(folder, seal=RECORD) as new:
        with _without_card(run.model):
            run.model.save_pretrained(str(new))
        run.tokenizer.save_pretrained(str(new))
        run.recipe.save(new / RECIPE, folder)
        run.record.save(new)


def save_record(run: Run, results: dict[str, Any]) -> Run:
    """Put new results into the record of a run, beside those of other splits, and write it.

    Args:
        run: The run; stays as it is.
        results: What ``evaluate`` returned, of all tasks and rows.

    Returns:
        The run with the new record.

    Raises:
        ValueError: If the results are of some tasks or rows only.
    """
    missing = missing_of(run, results)
    if missing:
        raise ValueError(
            f"The results of the {results['split']} split lack {missing}, so they cannot take the place of full ones. "
            "Evaluate all tasks, without a limit."
        )
    record = run.record.with_results(results)
    record.save(run.folder)
    return replace(run, record=record)


def missing_of(run: Run, results: Mapping[str, Any]) -> str:
    """What results of a run lack: tasks that have such a split, or rows beyond a limit; empty if they are full."""
    tasks = [name for name, task in run.recipe.tasks.items() if getattr(task, results["split"], None)]
    lacking = [name for name in tasks if name not in results["tasks"]]
    if lacking:
        return f"the tasks {shown(lacking)}"
    return f"rows beyond limit={results['limit']}" if "limit" in results else ""


@contextmanager
def _without_card(model: PeftModel) -> Iterator[None]:
    """Have ``save_pretrained`` leave the card to the caller, who knows more to tell."""
    name = "create_or_update_model_card"
    own = {name: vars(model)[name]} if name in vars(model) else {}
    vars(model)[name] = lambda folder: None
    try:
        yield
    finally:
        del vars(model)[name]
        vars(model).update(own)
