"""The fields of a recipe, section by section, and what each of them may hold."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Collection, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import TrainingArguments

from hyperadapt.config.checks import (
    OTHER_NAMES,
    check_choice,
    check_integer,
    check_number,
    check_type,
    shown,
    suggestion,
)
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.recipes.yaml_lines import Check, Keys, YamlFile, check_text, checked_texts, dotted

SPLITS = ("train", "validation", "test")
_COLUMNS = {"SEQ_CLS": ("text", "text_pair", "label", "labels"), "CAUSAL_LM": ("prompt", "completion", "messages")}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Set from other fields of the recipe, or by PEFT.
_NO_ADAPTER_FIELDS = {
    *(
        "tasks",
        "task_descriptions",
        "task_labels",
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
    ),
    *(
        "revision",
        "inference_mode",
        "plugin",
        "text_embedding_dim",
        "example_dim",
        "example_classes",
        "adapted_model",
        "adapted_modules",
    ),
}
# They would send the model elsewhere, start processes, or contradict what a run does with its data.
_NO_TRAINING_FIELDS = re.compile(
    "output_dir|resume_from_checkpoint|push_to_hub.*|hub_.*|deepspeed|fsdp.*|local_rank|do_.*|label_names|"
    "batch_eval_metrics|prediction_loss_only|include_for_metrics|remove_unused_columns"
)
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a section"}
_COUNT = partial(check_integer, maximum=2**31 - 1)
_FLAG = partial(check_type, kind=bool, description="true or false", optional=False)


class Section(NamedTuple):
    """A kind of section: whose fields it has, field -> check, fields it needs, and name often written -> right name."""

    owner: str
    checks: Mapping[str, Check | None]
    required: Collection[str] = ()
    synonyms: Mapping[str, str] = MappingProxyType({})

    def suggestion(self, name: str) -> str:
        """What may have been meant by an unknown name: a question with a space before it, or nothing."""
        return suggestion(name, self.checks, self.synonyms)

    def checked(self, file: YamlFile, keys: Keys, value: Any) -> dict[str, Any]:
        """The fields of a section of a file that are given, not null and right; the file gets the other problems."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            file.refuse(keys, f"{dotted(keys) or 'The file'} is {shown(value)}, but must hold lines of 'field: value'.")
            return {}
        for name in self.required:
            if value.get(name) is None:
                file.refuse((*keys, name), f"{dotted((*keys, name))} is missing.")
        checked = {}
        for name, entry in value.items():
            place = dotted((*keys, name))
            if name not in self.checks:
                file.refuse((*keys, name), f"{place} is no field of {self.owner}.{self.suggestion(name)}")
            elif entry is not None:
                check = self.checks[name]
                try:
                    result = check(place, entry) if check else None
                except (TypeError, ValueError) as error:
                    file.refuse((*keys, name), str(error))
                else:
                    checked[name] = entry if result is None else result
        return checked


def read_fields(file: YamlFile, folder: Path, to_train: bool) -> dict[str, Any]:
    """The fields of a recipe that are right, with absolute paths; the file gets a problem for each of the others."""
    sections = recipe_sections(folder, to_train)
    fields = sections.pop("").checked(file, (), file.data)
    fields |= {name: kind.checked(file, (name,), fields.get(name)) for name, kind in sections.items()}
    given, task_type = fields.get("tasks", {}), fields["adapter"].get("task_type")
    return fields | {"tasks": checked_tasks(file, given, task_type, folder, to_train, ["train"] if to_train else [])}


def checked_tasks(
    file: YamlFile,
    given: Mapping[str, Any],
    task_type: str | None,
    folder: Path,
    must_exist: bool,
    required: Collection[str],
) -> dict[str, dict[str, Any]]:
    """Name -> the fields of a task that are right; the file gets a problem for each of the others."""
    tasks = {}
    for name, fields in given.items():
        try:
            check_task_name(name)
        except ValueError as error:
            file.refuse(("tasks", name), str(error))
            continue
        task = {} if fields is None else fields
        has_dataset = isinstance(task, dict) and task.get("dataset") is not None
        section = _task_section(task_type, has_dataset, folder, must_exist)
        tasks[name] = section._replace(required=required).checked(file, ("tasks", name), task)
    return tasks


def recipe_sections(folder: Path, to_train: bool) -> dict[str, Section]:
    """The sections of a recipe but for its tasks, with ``""`` for its top; relative paths begin at the folder."""
    adapter = {one.name for one in dataclasses.fields(HyperAdapterConfig)} - _NO_ADAPTER_FIELDS
    sections = {
        "adapter": Section(
            "HyperAdapterConfig",
            dict.fromkeys(adapter)
            | {
                "task_type": partial(check_choice, choices=tuple(_COLUMNS)),
                "text_encoder": partial(_checked_source, folder, to_train),
            },
            required=["task_type"],
            synonyms=OTHER_NAMES,
        ),
        "max_rows": Section("max_rows", dict.fromkeys(SPLITS, _COUNT)),
        "trainer": Section(
            "HyperAdapterTrainer that a recipe sets",
            {"temperature": None, "max_tasks_per_batch": None, "log_task_losses": _FLAG, "log_positions": _FLAG},
        ),
        "training": Section(
            "TrainingArguments that a recipe sets",
            _training_checks(),
            synonyms={
                "lr": "learning_rate",
                "steps": "max_steps",
                "epochs": "num_train_epochs",
                "batch_size": "per_device_train_batch_size",
                "warmup": "warmup_steps",
            },
        ),
        "card": Section(
            "a card",
            dict.fromkeys(("title", "base_model", "license"), check_text)
            | {"language": _checked_one_or_more, "limits": checked_texts, "tags": checked_texts, "show_inputs": _FLAG},
        ),
    }
    top = {
        "base_model": partial(_checked_source, folder, True),
        "revision": check_text,
        "dtype": partial(check_choice, choices=("float32", "bfloat16", "float16")),
        "output_dir": _checked_folder,
        "max_length": partial(check_integer, maximum=2**20),
        "tasks": check_tasks,
        **dict.fromkeys(sections),
    }
    # Who writes them at the top gets their full names.
    misplaced = {f: f"{name}.{f}" for name in ("adapter", "training", "trainer") for f in sections[name].checks}
    return {"": Section("a recipe", top, ["base_model", "output_dir", "adapter", "tasks"], misplaced)} | sections


def _task_section(task_type: str | None, has_dataset: bool, folder: Path, must_exist: bool) -> Section:
    checks: dict[str, Check | None] = {
        "description": _checked_one_or_more,
        **dict.fromkeys(SPLITS, check_text if has_dataset else partial(checked_file, folder, must_exist)),
        "dataset": partial(_checked_source, folder, must_exist),
        **dict.fromkeys(("name", "revision"), check_text if has_dataset else _refuse_without_dataset),
    }
    columns = [name for kind, names in _COLUMNS.items() if task_type in (kind, None) for name in names]
    checks |= dict.fromkeys(columns, check_text) | ({"labels": checked_labels} if "labels" in columns else {})
    synonyms = {"file": "train", "valid": "validation", "dev": "validation", "sentence": "text", "config": "name"}
    owner = f"a {task_type} task" if task_type else "a task"
    return Section(owner, checks, synonyms=synonyms)


def _training_checks() -> dict[str, Check | None]:
    """The fields of ``TrainingArguments`` that a recipe may set, with a check of their types."""
    hints = typing.get_type_hints(TrainingArguments)
    kinds = {name: _kinds(hints[name]) for name in TrainingArguments.__dataclass_fields__}
    checks: dict[str, Check | None] = {
        name: partial(_check_kind, allowed)
        for name, allowed in kinds.items()
        if allowed and not _NO_TRAINING_FIELDS.fullmatch(name)
    }
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    rate = partial(check_number, rule="a finite number of at least 0", holds=lambda number: number >= 0)
    return checks | dict.fromkeys(counts, _COUNT) | {"learning_rate": rate}


def _kinds(hint: Any) -> set[Any]:
    """What YAML can give for an annotation."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    kinds = {typing.get_origin(part) or part for part in parts}
    return {str if isinstance(kind, type) and issubclass(kind, Enum) else kind for kind in kinds} & _KINDS.keys()


def _check_kind(allowed: set[type], name: str, value: Any) -> None:
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        words = " or ".join(word for kind, word in _KINDS.items() if kind in allowed)
        quotes = " Put it in quotes." if str in allowed else ""
        raise TypeError(f"{name}={shown(value)} must be {words}, not {type(value).__name__}.{quotes}")


def check_tasks(name: str, value: Any) -> None:
    """Refuse anything but a section that holds tasks."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{name} is {shown(value)}, but must hold a section for each task, under its name.")


def check_task_name(name: str) -> None:
    """Refuse a name that is empty, or taken for the mean over tasks."""
    if name == "mean" or not name.strip():
        raise ValueError(f"A task cannot have the name {name!r}. Choose another name.")


def _refuse_without_dataset(name: str, value: Any) -> None:
    raise ValueError(f"{name} belongs to a dataset, but none is given.")


def _checked_one_or_more(name: str, value: Any) -> str | tuple[str, ...]:
    texts = checked_texts(name, value)
    return texts if isinstance(value, list) else texts[0]


def checked_labels(name: str, value: Any) -> tuple[str, ...]:
    """Names of labels, all different."""
    check_type(name, value, list, "a list of names", optional=False)
    labels = checked_texts(name, value)
    if len(set(labels)) < len(labels):
        raise ValueError(f"{name}={shown(value)} holds a name twice. Give every label a name of its own.")
    return labels


def _checked_folder(name: str, value: Any) -> str:
    """A folder to write to, as it is given but for the user's own."""
    check_text(name, value)
    return os.path.expanduser(str(value))


def _checked_source(folder: Path, must_exist: bool, name: str, value: Any) -> str:
    """A name on the Hub, or a folder by its absolute path."""
    check_text(name, value)
    path = folder / Path(value).expanduser()
    if path.is_dir():
        return str(path.resolve())
    try:
        validate_repo_id(value)
        # Beside other folders it is a mistyped one: the Hub is not asked.
        is_name = "/" not in value or not path.parent.is_dir()
    except HFValidationError:
        is_name = False
    if must_exist and not is_name:
        raise ValueError(f"{name}={shown(value)} is neither a folder ({path}) nor a name on the Hub.")
    return str(value)


def checked_file(folder: Path, must_exist: bool, name: str, value: Any) -> str:
    """A file with data, by its absolute path."""
    check_text(name, value)
    path = (folder / Path(value).expanduser()).resolve()
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{name}={shown(value)} has an unknown ending. Give a file of {', '.join(SUFFIXES)}, or name a dataset "
            "and one of its splits."
        )
    if must_exist and not path.is_file():
        raise ValueError(f"{name}={shown(value)} is no file: there is none at {path}.")
    return str(path)
