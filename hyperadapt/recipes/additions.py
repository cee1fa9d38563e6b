"""Files of new tasks: a YAML file that says what a trained adapter learns next, and how it keeps what it knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hyperadapt.config.checks import check_choice, check_integer, check_number, shown, suggestion
from hyperadapt.recipes.recipe import Recipe, RecipeError, TaskRecipe, read_yaml
from hyperadapt.recipes.schema import Section, check_tasks, checked_file, checked_tasks
from hyperadapt.recipes.yaml_lines import Check, YamlFile, check_text

KEEP = ("replay", "exact")
_OF_THE_ADAPTER = ("base_model", "revision", "dtype", "output_dir", "max_length", "adapter", "trainer", "training")


@dataclass(frozen=True)
class Additions:
    """What a trained adapter learns next. Made by ``load_additions``, which checks the fields.

    Args:
        tasks: Name -> new task, in the order in which they are learned.
        keep: How the known tasks are kept: ``"replay"`` trains all of the adapter, half on rows of a new task and half
            on rows of the known ones; ``"exact"`` leaves every bit of theirs, and trains factors of the new task's own.
        replay: Known task -> file with rows of it, in place of what the adapter's recipe names.
        steps: Steps of the training on each new task; None for 100.
        learning_rate: Its rate; None for that of the adapter's recipe.
    """

    tasks: Mapping[str, TaskRecipe]
    keep: str = "replay"
    replay: Mapping[str, str] = field(default_factory=dict)
    steps: int | None = None
    learning_rate: float | None = None


def load_additions(path: str | os.PathLike[str], recipe: Recipe) -> Additions:
    """Read a file of new tasks and check all of its fields.

    Args:
        path: The YAML file, with the section ``tasks`` of a recipe, and the other fields of ``Additions``.
        recipe: That of the adapter.

    Returns:
        The new tasks, with absolute paths.

    Raises:
        RecipeError: If anything is wrong; it tells all problems with their lines.
    """
    path = Path(path)
    file = read_yaml(path)
    _refuse_fields_of_the_adapter(file)
    checks: dict[str, Check] = {
        "tasks": check_tasks,
        "keep": partial(check_choice, choices=KEEP),
        "replay": _check_files,
        "steps": partial(check_integer, maximum=2**31 - 1),
        "learning_rate": check_number,
    }
    section = Section("a file of new tasks", checks, ["tasks"], {"lr": "learning_rate", "max_steps": "steps"})
    fields = section.checked(file, (), file.data)
    # A wrong one says nothing of the tasks.
    is_wrong = isinstance(file.data, dict) and file.data.get("keep") is not None and "keep" not in fields
    folder, keep = path.resolve().parent, "" if is_wrong else fields.get("keep", KEEP[0])
    tasks = checked_tasks(file, fields.get("tasks", {}), recipe.task_type, folder, True, [])
    for name, task in tasks.items():
        _check_task(file, name, task, recipe, keep)
    replay = _checked_replay(file, fields.get("replay", {}), recipe, folder)
    if keep == "exact" and "replay" in fields:
        file.refuse(
            ("replay",),
            "replay names rows of known tasks, which keep='exact' holds without them. Leave it out, or set keep: "
            "replay.",
        )
    given = [name for name in ("steps", "learning_rate") if name in fields]
    if keep == "exact" and given and tasks and not any("train" in task for task in tasks.values()):
        file.refuse(
            (given[0],),
            f"{given[0]} is for a training, but no task has rows to train on (train). Leave it out, or name some.",
        )
    if file.problems:
        raise RecipeError(path, file.problems)
    options = {name: fields[name] for name in ("steps", "learning_rate") if name in fields}
    return Additions({name: TaskRecipe(**task) for name, task in tasks.items()}, keep, replay, **options)


def _refuse_fields_of_the_adapter(file: YamlFile) -> None:
    for name in _OF_THE_ADAPTER:
        if isinstance(file.data, dict) and file.data.pop(name, None) is not None:
            file.refuse((name,), f"{name} cannot be changed: it is that of the adapter which learns on. Leave it out.")


def _check_files(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{name}={shown(value)} must hold lines of 'task: file', each with a known task.")


def _check_task(file: YamlFile, name: str, task: Mapping[str, Any], recipe: Recipe, keep: str) -> None:
    keys = ("tasks", name)
    if name in recipe.tasks:
        file.refuse(keys, f"tasks.{name}: the adapter already has a task {name!r}. Give the new one another name.")
    if "train" in task:
        return
    if keep == "replay":
        file.refuse(
            keys,
            f"tasks.{name}.train is missing, and keep='replay' trains on its rows. Name a file, or set keep: exact, "
            "which can do with a description.",
        )
    elif keep == "exact" and "description" not in task:
        file.refuse(keys, f"tasks.{name} has neither rows (train) nor a description to go by. Give one of the two.")


def _checked_replay(file: YamlFile, given: Mapping[str, Any], recipe: Recipe, folder: Path) -> dict[str, str]:
    """Known task -> file, by its absolute path."""
    checked = {}
    for name, value in given.items():
        place = f"replay.{name}"
        if name not in recipe.tasks:
            file.refuse(
                ("replay", name),
                f"{place} names no task that the adapter knows.{suggestion(name, recipe.tasks, {})} It knows "
                f"{shown(list(recipe.tasks))}.",
            )
            continue
        try:
            check_text(place, value)
            checked[name] = checked_file(folder, True, place, value)
        except (TypeError, ValueError) as error:
            file.refuse(("replay", name), str(error))
    return checked
