"""A starter recipe, made of data files: what their tasks are is guessed from their names and columns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperadapt.recipes.column_guesses import Guess, guess_columns
from hyperadapt.recipes.columns import file_columns
from hyperadapt.recipes.recipe import Recipe, load_recipe
from hyperadapt.recipes.rows import read_rows
from hyperadapt.recipes.schema import SPLITS, SUFFIXES, check_task_name
from hyperadapt.recipes.yaml_lines import dump_yaml

BASES = {"SEQ_CLS": "google-bert/bert-base-uncased", "CAUSAL_LM": "Qwen/Qwen2.5-0.5B"}
CHAT_BASE = "Qwen/Qwen2.5-0.5B-Instruct"
# How files are often named -> split.
_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
_NAMED = re.compile(rf"(?:(.+?)[-_.])?({'|'.join(_SPLITS)})(?:-\d+-of-\d+)?", re.IGNORECASE)
# A token of English has about four letters, of other languages fewer.
_LETTERS_OF_A_TOKEN = 3
_LENGTHS = (32, 64, 128, 256, 512, 1024)

Files = Mapping[str, Mapping[str, Path]]


@dataclass(frozen=True)
class Starter:
    """A recipe that was written: what it says, and what was guessed, a line for each guess."""

    recipe: Recipe
    guesses: tuple[str, ...]


def write_starter(sources: Sequence[Path], path: Path, base_model: str | None = None) -> Starter:
    """Write a recipe for data files and folders of them, which trains as it is; a file that is there is left alone."""
    if path.exists():
        raise FileExistsError(f"{str(path)!r} is there already. Name another file, or remove it.")
    files = _files_of_tasks(sources)
    guesses = {
        name: guess_columns(file_columns(by_split["train"], f"Task {name!r}, {by_split['train']}"), name)
        for name, by_split in files.items()
    }
    task_type = _common_type(guesses)
    longest = max(guess.letters for guess in guesses.values())
    length = next((one for one in _LENGTHS if one >= longest / _LETTERS_OF_A_TOKEN), _LENGTHS[-1])
    base = base_model or (CHAT_BASE if any(guess.is_chat for guess in guesses.values()) else BASES[task_type])
    said = [f"{name}: {guess.words}; {_splits_in_words(files[name])}" for name, guess in guesses.items()]
    said.append(f"base_model: {base}" + ("" if base_model else ", a small one to begin with"))
    said.append(f"max_length: {length} tokens, by the longest row, which has {longest} letters")
    folder = path.parent.resolve()
    fields = {
        "base_model": _from(folder, Path(base)) if Path(base).is_dir() else base,
        "output_dir": f"runs/{path.stem}",
        "max_length": length,
        "adapter": {"task_type": task_type, "target_modules": "all-linear"},
        "tasks": {
            name: {**{split: _from(folder, file) for split, file in files[name].items()}, **guess.fields}
            for name, guess in guesses.items()
        },
    }
    head = ["Written by hyperadapt init, which guessed:", *(f"- {line}" for line in said)]
    return Starter(_written(path, "".join(f"# {line}\n" for line in head) + dump_yaml(fields)), tuple(said))


def _written(path: Path, text: str) -> Recipe:
    """The recipe that a new file with the text makes; where it or its data are wrong, there is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    try:
        recipe = load_recipe(path)
        for name, task in recipe.tasks.items():
            labels = read_rows(recipe, name, "train").names or None
            labelled = replace(recipe, tasks={name: replace(task, labels=labels)})
            for split in SPLITS[1:]:
                if getattr(task, split):
                    read_rows(labelled, name, split)
    except BaseException:
        path.unlink()
        raise
    return recipe


def _files_of_tasks(sources: Sequence[Path]) -> Files:
    """Task -> split -> file, by the files' names."""
    tasks: dict[str, dict[str, Path]] = {}
    for file in _files(sources):
        found = _NAMED.fullmatch(file.stem)
        name = (found[1] or file.resolve().parent.name) if found else file.stem
        split = _SPLITS[found[2].lower()] if found else "train"
        other = tasks.setdefault(name, {}).setdefault(split, file)
        if other != file:
            raise ValueError(
                f"{str(other)!r} and {str(file)!r} would both be the {split} split of task {name!r}. Leave one out, or "
                "rename one after its task."
            )
    for name, by_split in tasks.items():
        check_task_name(name)
        if "train" not in by_split:
            raise ValueError(
                f"Task {name!r} has no rows to train on, only {', '.join(map(str, by_split.values()))}. Add a file of "
                f"such a name as {name}_train.jsonl."
            )
    return {name: {split: by_split[split] for split in SPLITS if split in by_split} for name, by_split in tasks.items()}


def _files(sources: Sequence[Path]) -> list[Path]:
    """The files, and those in folders and one level below."""
    files: list[Path] = []
    for source in sources:
        if not source.is_dir():
            if source.suffix not in SUFFIXES:
                raise ValueError(f"{str(source)!r} has an unknown ending. Give files of {', '.join(SUFFIXES)}.")
            files.append(source)
            continue
        inside = sorted(
            one
            for one in (*source.glob("*"), *source.glob("*/*"))
            if one.suffix in SUFFIXES and not _is_hidden(one.relative_to(source))
        )
        if not inside:
            raise ValueError(f"The folder {str(source)!r} holds no data, which are files of {', '.join(SUFFIXES)}.")
        files += inside
    return list(dict.fromkeys(files))


def _is_hidden(path: Path) -> bool:
    """Whether it is what programs keep for themselves, such as a notebook's checkpoints."""
    return any(part.startswith(".") for part in path.parts)


def _common_type(guesses: Mapping[str, Guess]) -> str:
    types = {guess.task_type: name for name, guess in guesses.items()}
    if len(types) > 1:
        raise ValueError(
            f"Task {types['SEQ_CLS']!r} has labels, but task {types['CAUSAL_LM']!r} has answers, and a recipe trains "
            "one kind. Make a recipe of each kind, or write labels as answers: prompt and completion."
        )
    return next(iter(types))


def _splits_in_words(by_split: Mapping[str, Any]) -> str:
    lacking = [split for split in SPLITS if split not in by_split]
    return ", ".join(by_split) + (f", no {' and no '.join(lacking)}" if lacking else "")


def _from(folder: Path, path: Path) -> str:
    """A path as the recipe in the folder says it."""
    path = path.resolve()
    is_apart = os.path.commonpath([path, folder]) == os.sep
    return str(path) if is_apart else os.path.relpath(path, folder)
