"""A new task for a trained run: added as it is described, fitted to examples, or trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hyperadapt.config.checks import check_integer, check_number, shown
from hyperadapt.loras.generator import GeneratedLora, LoraGenerator
from hyperadapt.recipes.base_models import quiet_loading
from hyperadapt.recipes.recipe import TaskRecipe
from hyperadapt.recipes.rows import TaskRows, sampled
from hyperadapt.recipes.schema import check_task_name, checked_file, checked_labels
from hyperadapt.recipes.tokens import collator
from hyperadapt.runs.evaluation import evaluate_rows, no_better_lines, tokenize
from hyperadapt.runs.record import prompt_of
from hyperadapt.runs.replay import Replay, Source, read_replay, read_source, train_with_replay, trainable
from hyperadapt.runs.run import Run
from hyperadapt.runs.training import Report, write_line
from hyperadapt.tasks.examples import MAX_EXAMPLES as READ
from hyperadapt.tuner.active import active_network, find_tuner

# Of more, that many are drawn: all of them are run through the model from up to 66 starting points.
MAX_EXAMPLES = 256
STEPS = 100
_MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class AddedTask:
    """What became of a task that was added; printed, it is a last word on it.

    Args:
        name: The task.
        examples: What it scores on its own examples: ``accuracy``, ``loss``, ``rows`` and ``majority``; None without
            examples.
        no_better_than_majority: Whether always giving the most frequent answer would do as well on them.
        old_tasks: Of a training, old task -> ``before`` and ``after``, its accuracies, on ``rows`` rows of ``split``.
        trained: Whether the adapter, or the task's own factors, were trained on its examples.
    """

    name: str
    examples: Mapping[str, float] | None = None
    no_better_than_majority: bool = False
    old_tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained: bool = False

    def __str__(self) -> str:
        if self.examples is None:
            return f"{self.name}: added by its description, and not tried on any row"
        shares = "accuracy {accuracy:.3f}, most frequent answer {majority:.3f}, loss {loss:.3f}"
        lines = [f"{self.name}, on its own {self.examples['rows']} examples: {shares.format(**self.examples)}"]
        if self.no_better_than_majority:
            results = {"tasks": {self.name: self.examples}, "no_better_than_majority": [self.name]}
            remedy = "train longer, or at another rate" if self.trained else "train on it, with train=True (--train)"
            lines += [f"{line}: {remedy}" for line in no_better_lines(results)]
        if self.old_tasks:
            before, after = (
                sum(values[time] for values in self.old_tasks.values()) / len(self.old_tasks)
                for time in ("before", "after")
            )
            lines.append(f"old tasks, mean accuracy: {before:.3f} before, {after:.3f} after")
        lines += [
            f"  {name}: {values['before']:.3f} before, {values['after']:.3f} after ({values['split']}, "
            f"{values['rows']} rows)"
            for name, values in self.old_tasks.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Way:
    """How a task is added, see ``add_task``."""

    fit: bool = False
    train: bool = False
    # Whether it gets factors of its own, which are trained alone on its rows.
    own_factors: bool = False
    replay: Mapping[str, Source] = field(default_factory=dict)
    steps: int = STEPS
    learning_rate: float | None = None


def add_task(  # noqa: DOC502, DOC503
    run: Run,
    name: str,
    *,
    description: str | Sequence[str] | None = None,
    examples: Source | None = None,
    test: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    fit: bool = False,
    train: bool = False,
    replay: Mapping[str, Source] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    report: Report | None = write_line,
) -> AddedTask:
    """Add a task to a trained adapter in memory; write it with ``save_run``.

    There are three ways:
        - A description alone is the task's condition. Nothing is trained.
        - Of examples, an adapter that was trained with examples makes the new task's embedding in one pass; in another
          one, and with `fit`, that embedding alone is fitted. Everything else is frozen.
        - With `train`, all of the adapter is trained, half on the examples and half on rows of the old tasks, which
          keeps those from being forgotten. In an adapter that reads descriptions, a task with a description starts from
          that, else from an embedding that is fitted to the examples first.

    In the first two ways the other tasks keep every bit.

    Args:
        run: The run, whose model, recipe and record are changed; on an error nothing is.
        name: Name of the task.
        description: What the task is, one text or several.
        examples: Labelled rows; without `train`, 8 to 64 are enough: a file or a data set with the columns of a
            recipe's defaults. Where they are read in one pass, 32 of them if there are more.
        test: File with rows to evaluate on later.
        labels: Names of the task's labels, among those of the classifier; None takes them from the examples.
        fit: Whether to fit the task's embedding to the examples also where they can be read.
        train: Whether to train all of the adapter.
        replay: Old task -> a file or a data set with rows of it, in place of what the recipe names.
        steps: Steps of the training, by default 100.
        learning_rate: Its rate; None for the recipe's.
        report: As in ``train``.

    Returns:
        How well the task fits its own examples, and what a training cost the old tasks.

    Raises:
        ValueError: If the name is taken, nothing is given to go by, the data are wrong, the classifier does not know
            a label, there are no rows of old tasks, or the trained task answers none of its examples right.
    """
    check_task_name(name)
    _check_training(train, examples, {"replay": replay, "steps": steps, "learning_rate": learning_rate})
    task = TaskRecipe(
        description=description if description is None or isinstance(description, str) else tuple(description),
        labels=checked_labels("labels", list(labels)) if labels else None,
        train=None if isinstance(examples, Dataset) else _given_file("examples", examples),
        test=_given_file("test", test),
    )
    rows = (
        None if examples is None else read_source(task, name, run.recipe.task_type, task.train or examples, "examples")
    )
    way = Way(fit=fit, train=train, replay=replay or {}, steps=steps or STEPS, learning_rate=learning_rate)
    return add_checked(run, name, task, rows, way, report)


def add_checked(
    run: Run, name: str, task: TaskRecipe, rows: TaskRows | None, way: Way, report: Report | None
) -> AddedTask:
    """As ``add_task``, of a task with its rows."""
    task = with_labels(run, name, task, rows)
    old = read_replay(run, way.replay) if way.train else Replay({}, {}, {})
    has_own = way.own_factors and rows is not None
    before = run.recipe, run.record
    by_description = way.train and task.description is not None and _reads_text(run)
    _add(run, name, task, rows, by_description=by_description, fit=way.fit)
    try:
        if has_own:
            _add_own_factors(run, name)
        if rows is not None and run.recipe.shows_inputs:
            run.record = replace(
                run.record, prompts={**run.record.prompts, name: prompt_of(rows, run.recipe.task_type)}
            )
        with quiet_loading() if report is None else nullcontext():
            if rows is None or not (way.train or has_own):
                return _told(run, name, rows)
            with trainable(run.model, name if has_own else None):
                return _trained(run, name, rows, old, way, report)
    except BaseException:
        find_tuner(run.model).remove_task(name)
        run.recipe, run.record = before
        raise


def with_labels(run: Run, name: str, task: TaskRecipe, rows: TaskRows | None) -> TaskRecipe:
    """A task with its labels, which a classifier knows; that of a language model as it is."""
    if run.recipe.task_type != "SEQ_CLS":
        return task
    task = replace(task, labels=task.labels or (rows.names if rows else None))
    _check_known_labels(run, name, task)
    return task


def _given_file(name: str, path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else checked_file(Path(), True, name, os.fspath(path))


def _check_training(train: bool, examples: Source | None, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and not train:
        raise ValueError(f"{', '.join(given)}: this is for a training, and train is not set. Set it, or leave it out.")
    if train and examples is None:
        raise ValueError("train needs examples to train on. Give them, or leave train out.")
    if options["steps"] is not None:
        check_integer("steps", options["steps"], _MAX_STEPS)
    if options["learning_rate"] is not None:
        check_number("learning_rate", options["learning_rate"])


def _add(run: Run, name: str, task: TaskRecipe, rows: TaskRows | None, *, by_description: bool, fit: bool) -> None:
    """Add a task to model and recipe, by its description alone or by what there is."""
    most = MAX_EXAMPLES if fit or not active_network(run.model)[1].config.has_examples else READ
    examples = None if rows is None or by_description else sampled(rows, most)
    find_tuner(run.model).add_task(
        name,
        description=task.description,
        examples=None if examples is None else tokenize(examples, run.recipe, run.tokenizer),
        data_collator=collator(run.tokenizer, run.recipe.task_type),
        fit=fit,
    )
    if task.labels:
        known = run.recipe.labels
        find_tuner(run.model).set_labels(name, {known.index(label): label for label in task.labels})
    adapter = {**run.recipe.adapter, "task_embedding": active_network(run.model)[1].config.task_embedding}
    run.recipe = replace(run.recipe, adapter=adapter, tasks={**run.recipe.tasks, name: task})


def _add_own_factors(run: Run, name: str) -> None:
    find_tuner(run.model).add_own_factors(name)
    own = active_network(run.model)[1].config.own_factors
    run.recipe = replace(run.recipe, adapter={**run.recipe.adapter, "own_factors": own})


def _reads_text(run: Run) -> bool:
    return any(active_network(run.model)[1].config.embedded_descriptions)


def _told(run: Run, name: str, rows: TaskRows | None) -> AddedTask:
    """How well a task fits its own examples."""
    if rows is None:
        return AddedTask(name)
    own = tokenize(sampled(rows, MAX_EXAMPLES), run.recipe, run.tokenizer)
    results = evaluate_rows(run, "examples", {name: own}, 64)
    return AddedTask(name, results["tasks"][name], bool(results["no_better_than_majority"]))


def _trained(
    run: Run,
    name: str,
    rows: TaskRows,
    old: Replay,
    way: Way,
    report: Report | None,
) -> AddedTask:
    """Train a task that was added, and measure it and the old ones that are replayed."""
    say = report or (lambda line: None)
    left_out = [task for task in run.recipe.tasks if task not in old.train and task != name]
    if old.train and left_out:
        say(f"no rows to train on again: {', '.join(left_out)}")
    accuracies = [_accuracies(run, old)]
    own = tokenize(rows, run.recipe, run.tokenizer)
    replayed = f" and {sum(map(len, old.train.values()))} of {len(old.train)} old tasks" if old.train else ""
    say(f"training on {len(own)} rows of {name}{replayed}")
    facts = train_with_replay(
        run, name, own, old.train, steps=way.steps, learning_rate=way.learning_rate, report=report
    )
    accuracies.append(_accuracies(run, old))
    told = _told(run, name, rows)
    _check_learned(told, facts)
    added = {**run.record.training.get("added_tasks", {}), name: facts}
    # After a replay, the results are those of the adapter before.
    stale: dict[str, Any] = {"results": {}, "other_results": {}} if old.train else {}
    run.record = replace(run.record, training={**run.record.training, "added_tasks": added}, **stale)
    first, last = accuracies
    return replace(
        told,
        trained=True,
        old_tasks={
            task: {"before": first[task], "after": last[task], "rows": len(data), "split": old.splits[task]}
            for task, data in old.measured.items()
        },
    )


def _check_learned(told: AddedTask, facts: Mapping[str, Any]) -> None:
    """Refuse a trained task that answers nothing right."""
    assert told.examples is not None
    # Where each example has an answer of its own, none need be met to the letter.
    if told.no_better_than_majority and not told.examples["accuracy"]:
        raise ValueError(
            f"After {facts['steps']} steps at a rate of {facts['learning_rate']:g}, task {told.name!r} answers none of "
            f"its {told.examples['rows']} examples right, so it was not added. Train longer (steps), at another "
            "learning_rate, or check the examples."
        )


def _accuracies(run: Run, old: Replay) -> dict[str, float]:
    results = evaluate_rows(run, "old tasks", old.measured, 64)["tasks"] if old.measured else {}
    return {task: values["accuracy"] for task, values in results.items()}


def lora_from_examples(  # noqa: DOC502
    run: Run,
    examples: str | os.PathLike[str],
    *,
    description: str | Sequence[str] | None = None,
    text_encoder: str | None = None,
) -> GeneratedLora:
    """Make the LoRA that examples ask for; the run stays as it is.

    Args:
        run: The run, whose adapter was trained with examples.
        examples: File of labelled rows, as in ``add_task``; 32 of them are read if there are more.
        description: What the task is, one text or several.
        text_encoder: The adapter's text encoder, if its folder has moved.

    Returns:
        The LoRA, with ``state_dict()`` and ``save(folder, format=)``.

    Raises:
        ValueError: If the adapter has no task with examples, the data are wrong, or the classifier does not know a
            label.
    """
    task = TaskRecipe(train=checked_file(Path(), True, "examples", os.fspath(examples)))
    task_type = run.recipe.task_type
    rows = sampled(read_source(task, "(new)", task_type, task.train or examples, "examples"), READ)
    with_labels(run, "(new)", task, rows)
    return LoraGenerator.from_model(run.model).from_examples(
        tokenize(rows, run.recipe, run.tokenizer),
        description=description,
        text_encoder=text_encoder,
        data_collator=collator(run.tokenizer, task_type),
    )


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
