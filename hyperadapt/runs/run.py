"""Runs: an adapter is trained as a recipe says, kept with recipe and record, evaluated, and given new tasks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from hyperadapt.cards.card import CARD, addressed
from hyperadapt.config.checks import check_choice, shown
from hyperadapt.files import whole_folder
from hyperadapt.recipes.base_models import SAFELY, load_base, quiet_loading
from hyperadapt.recipes.columns import dataset_columns, read_columns
from hyperadapt.recipes.recipe import Recipe, TaskRecipe, load_recipe
from hyperadapt.recipes.rows import TaskRows, checked_rows, data_columns, read_rows, sampled
from hyperadapt.recipes.schema import SPLITS, check_task_name, checked_file, checked_labels
from hyperadapt.recipes.tokens import collator, tokenized
from hyperadapt.runs.evaluation import class_scores, completion_scores
from hyperadapt.runs.record import RECIPE, RECORD, Record
from hyperadapt.runs.training import (
    CHECKPOINTS,
    Report,
    begin,
    check_folder,
    is_finished,
    make_trainer,
    read_data,
    training_facts,
    write_line,
)
from hyperadapt.tuner.active import find_tuner

# Of more, that many are sampled: all of them are run through the model from up to 66 starting points.
MAX_EXAMPLES = 256
_AUTO_CLASSES = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM}


@dataclass
class Run:
    """A trained adapter with all that belongs to it.

    Args:
        model: The base model with the adapter, in evaluation mode.
        tokenizer: The tokenizer.
        recipe: The recipe, with the labels of all tasks.
        record: What the training did.
        folder: Where it was loaded from.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    record: Record
    folder: Path


def load_run(  # noqa: DOC502
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
        ValueError: If the folder holds no run.
    """
    folder = _found(source, revision, token)
    record = Record.load(folder)
    recipe = load_recipe(folder / RECIPE, to_train=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
    with quiet_loading():
        model = PeftModel.from_pretrained(load_base(recipe, tokenizer), str(folder))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Run(model.to(device).eval(), tokenizer, recipe, record, folder)


def load_model(  # noqa: DOC503
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> PeftModel:
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
    folder = _found(source, revision, token)
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
    folder = _found(source, revision, token)
    return Record.load(folder) if (folder / RECORD).exists() else None


def save_run(run: Run, folder: str | os.PathLike[str]) -> None:
    """Write adapter, tokenizer, recipe and record; all of them, or nothing changes.

    Args:
        run: The run.
        folder: The folder; made if missing, other files in it are left alone.
    """
    folder = Path(folder)
    with whole_folder(folder, seal=RECORD) as new:
        card = new / CARD
        if (folder / CARD).exists():
            # Saving completes the metadata of a card, and keeps its text.
            card.write_bytes((folder / CARD).read_bytes())
        run.model.save_pretrained(str(new))
        card.write_text(addressed(card.read_text(encoding="utf-8"), str(folder)), encoding="utf-8")
        run.tokenizer.save_pretrained(str(new))
        run.recipe.save(new / RECIPE, folder)
        run.record.save(new)


def save_record(run: Run, results: dict[str, Any]) -> Run:
    """Put new results into the record of a run, and write it.

    Args:
        run: The run; stays as it is.
        results: What ``evaluate`` returned.

    Returns:
        The run with the new record.
    """
    record = replace(run.record, results=results)
    record.save(run.folder)
    return replace(run, record=record)


def evaluate(run: Run, split: str = "test", tasks: Sequence[str] | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Measure loss and accuracy task by task; every row competes among its own task's labels only.

    Args:
        run: The run.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: Names of tasks; None for all that have such a split.
        batch_size: Rows at once.

    Returns:
        ``split``; ``tasks``, task -> ``accuracy`` (of language models: exact matches of greedily generated answers),
        ``loss``, ``rows`` and ``majority`` (what the most frequent answer would reach); and ``mean``, the unweighted
        means over tasks.

    Raises:
        ValueError: If a task is unknown, there is no such split, or its data cannot be read.
    """
    check_choice("split", split, SPLITS)
    known = run.recipe.tasks
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise ValueError(
            f"tasks names {shown(unknown)}, which are no tasks of the run. Its tasks: {shown(list(known))}."
        )
    names = list(tasks) if tasks else [name for name in known if getattr(known[name], split)]
    lacking = [name for name in names if getattr(known[name], split) is None]
    if lacking or not names:
        raise ValueError(
            f"split={split!r} is not given for the tasks {shown(lacking or list(known))}. Name its file in {RECIPE} of "
            f"{run.folder}, or choose another split."
        )
    rows = {name: read_rows(run.recipe, name, split) for name in names}
    total = sum(len(one.texts) for one in rows.values())
    with logging.tqdm(total=total, desc=f"evaluating {split}", unit="row") as bar:
        scores = {name: _scores(run, name, one, batch_size, bar.update) for name, one in rows.items()}
    mean = {
        metric: sum(values[metric] for values in scores.values()) / len(scores)
        for metric in ("accuracy", "loss", "majority")
    }
    return {"split": split, "tasks": scores, "mean": mean}


def add_task(  # noqa: DOC502
    run: Run,
    name: str,
    *,
    description: str | Sequence[str] | None = None,
    examples: str | os.PathLike[str] | Dataset | None = None,
    test: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Add a task to a trained adapter in memory; the other tasks keep every bit.

    Args:
        run: The run, whose model and recipe are changed; write it with ``save_run``.
        name: Name of the task.
        description: What the task is, one text or several. Alone it needs no training.
        examples: 8 to 64 labelled rows, a file or a data set with the columns of a recipe's defaults.
        test: File with rows to evaluate on later.
        labels: Names of the task's labels, among those of the classifier; None takes them from the examples.

    Raises:
        ValueError: If the name is taken, nothing is given to go by, the data are wrong, or the classifier does not know
            a label.
    """
    check_task_name(name)
    files = {"train": None if isinstance(examples, Dataset) else examples, "test": test}
    task = TaskRecipe(
        description=description if description is None or isinstance(description, str) else tuple(description),
        labels=checked_labels("labels", list(labels)) if labels else None,
        **{
            split: checked_file(Path(), True, split, os.fspath(path))
            for split, path in files.items()
            if path is not None
        },
    )
    task_type = run.recipe.task_type
    rows = None if examples is None else _example_rows(task, name, task_type, examples)
    if task_type == "SEQ_CLS":
        task = replace(task, labels=task.labels or (rows.names if rows else None))
        _check_known_labels(run, name, task)
    encoded = None
    if rows is not None:
        encoded = tokenized(
            rows, run.tokenizer, task_type=task_type, labels=run.recipe.labels, max_length=run.recipe.max_length
        )
    tuner = find_tuner(run.model)
    tuner.add_task(name, description=description, examples=encoded, data_collator=collator(run.tokenizer, task_type))
    config = tuner.router.network(tuner.active_adapters[0]).config
    adapter = {**run.recipe.adapter, "task_embedding": config.task_embedding}
    run.recipe = replace(run.recipe, adapter=adapter, tasks={**run.recipe.tasks, name: task})


def _found(source: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(os.fspath(source), revision=revision, token=token, ignore_patterns=["checkpoints/*"]))


def _scores(run: Run, name: str, rows: TaskRows, batch_size: int, progress: Any) -> dict[str, float]:
    labels, task_type = run.recipe.labels, run.recipe.task_type
    dataset = tokenized(rows, run.tokenizer, task_type=task_type, labels=labels, max_length=run.recipe.max_length)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if task_type == "CAUSAL_LM":
        return completion_scores(run.model, run.tokenizer, dataset, name, **options)
    own = [labels.index(label) for label in rows.names]
    return class_scores(run.model, run.tokenizer, dataset, name, own, **options)


def _example_rows(task: TaskRecipe, name: str, task_type: str, examples: Any) -> TaskRows:
    columns = data_columns(task, task_type)
    if isinstance(examples, Dataset):
        found = dataset_columns(examples, f"Task {name!r}, examples", columns)
    else:
        found = read_columns(task, name, "train", columns)
    return sampled(checked_rows(found, task, task_type), MAX_EXAMPLES)


def _check_known_labels(run: Run, name: str, task: TaskRecipe) -> None:
    known = run.recipe.labels
    if task.labels is None:
        raise ValueError(
            f"Task {name!r} needs labels=, the names that its rows may get. The classifier knows {shown(known)}."
        )
    unknown = [label for label in task.labels if label not in known]
    if unknown:
        raise ValueError(
            f"Task {name!r} has the labels {shown(unknown)}, for which the classifier has no output: those of a "
            f"trained adapter are fixed. It knows {shown(known)}. Rename the labels, or train anew with this task."
        )


def train(  # noqa: DOC502
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, report: Report | None = write_line
) -> Path:
    """Train as a recipe says, evaluate, and write adapter, tokenizer, recipe and record.

    Evaluated is the test split of the tasks that have one; if none has, the validation split, or else the rows that
    were trained on. Checkpoints are removed in the end, unless the recipe sets ``save_total_limit``.

    Args:
        recipe: The recipe, whose `output_dir` is written to.
        resume: Whether to go on with an unfinished run in the folder. Where it is finished, nothing is done.
        overwrite: Whether to replace a run in the folder.
        report: Gets a line of text for each stage and log; None for no lines and no bars.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds anything else, or data are wrong.
    """
    started, folder = time.monotonic(), Path(recipe.output_dir)
    if resume and is_finished(folder):
        return folder
    say = report or (lambda line: None)
    checkpoint = check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(recipe.base_model, revision=recipe.revision or "main", **SAFELY)
    say(f"reading the data of {len(recipe.tasks)} tasks")
    labelled, data = read_data(recipe, tokenizer)
    arguments = recipe.training_arguments(folder / CHECKPOINTS)
    set_seed(arguments.seed)
    with quiet_loading():
        base = load_base(labelled, tokenizer)
    model = get_peft_model(base, recipe.adapter_config, revision=recipe.revision)
    trainer = make_trainer(model, tokenizer, labelled, arguments, data, report)
    begin(folder, recipe, checkpoint)
    say(f"training on {sum(map(len, data['train'].values()))} rows")
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    run = Run(model.eval(), tokenizer, labelled, Record(training_facts(trainer, data), {}, history), folder)
    split = next((split for split in ("test", "validation") if _has(labelled, split)), "train")
    with quiet_loading() if report is None else nullcontext():
        results = evaluate(run, split, batch_size=arguments.per_device_eval_batch_size)
    facts = {**run.record.training, "seconds": round(time.monotonic() - started)}
    save_run(replace(run, record=Record(facts, results, history)), folder)
    if "save_total_limit" not in recipe.training:
        shutil.rmtree(folder / CHECKPOINTS)
    return folder


def _has(recipe: Recipe, split: str) -> bool:
    return any(getattr(task, split) for task in recipe.tasks.values())
