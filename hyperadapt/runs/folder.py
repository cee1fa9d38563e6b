"""The folder of a run: where it is, and whether a training may write to it."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.trainer_utils import get_last_checkpoint

from hyperadapt.config.checks import shown
from hyperadapt.files import UNFINISHED
from hyperadapt.recipes.recipe import Recipe, load_recipe
from hyperadapt.runs.record import RECORD

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"


def find_folder(source: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """The folder of a run, fetched if it is a name on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(os.fspath(source), revision=revision, token=token, ignore_patterns=["checkpoints/*"]))


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run, which has a record."""
    return (folder / RECORD).exists()


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write to a folder; what others wrote is never replaced."""
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
    if resume and begun.exists():
        _check_same(load_recipe(begun, to_train=False), recipe, folder)


def last_checkpoint(folder: Path) -> str | None:
    """The checkpoint of an unfinished run to go on from; None if there is none."""
    if not (folder / CHECKPOINTS / RECIPE).exists():
        return None
    checkpoint: str | None = get_last_checkpoint(str(folder / CHECKPOINTS))  # type: ignore[no-untyped-call]
    return checkpoint


def begin(folder: Path, recipe: Recipe, checkpoint: str | None) -> None:
    """Make the folder of a run's checkpoints with the recipe; without one to go on from, those that are there go."""
    checkpoints = folder / CHECKPOINTS
    if checkpoint is None and checkpoints.exists():
        shutil.rmtree(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    recipe.save(checkpoints / RECIPE)


def _is_remnant(path: Path) -> bool:
    """Whether a run that failed at its start, or was killed while it was saved, may have left this."""
    return path.name.startswith(UNFINISHED) or (path.is_dir() and not any(path.iterdir()))


def _check_same(begun: Recipe, recipe: Recipe, folder: Path) -> None:
    one, two = _to_train(begun), _to_train(recipe)
    names = [field.name for field in fields(Recipe) if field.name not in ("output_dir", "card")]
    changed = [name for name in names if getattr(one, name) != getattr(two, name)]
    if changed:
        raise ValueError(
            f"The unfinished run in output_dir={str(folder)!r} was begun with another recipe: {', '.join(changed)} "
            "changed. Undo that, or ask to overwrite the run."
        )


def _to_train(recipe: Recipe) -> Recipe:
    """A recipe without what only the evaluation in the end reads."""
    tasks = {name: replace(task, test=None) for name, task in recipe.tasks.items()}
    training = {name: value for name, value in recipe.training.items() if name != "per_device_eval_batch_size"}
    max_rows = {split: count for split, count in recipe.max_rows.items() if split != "test"}
    return replace(recipe, tasks=tasks, training=training, max_rows=max_rows)
