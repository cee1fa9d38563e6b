"""The fields of a recipe, section by section, and what each of them may hold."""

from __future__ import annotations

import dataclasses
import re
import typing
from enum import Enum
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers import TrainingArguments

from hyperadapt.config.checks import check_choice, check_integer, check_number, check_type, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.recipes.yaml_lines import Check, YamlFields, check_text, check_texts

SPLITS = ("train", "validation", "test")
TASK_TYPES = ("SEQ_CLS", "CAUSAL_LM")
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_DTYPES = ("float32", "bfloat16", "float16")
_LARGE = 2**31 - 1
# Set from other fields of the recipe, or by PEFT.
_NO_ADAPTER_FIELDS = {
    *("tasks", "task_descriptions", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "plugin", "text_embedding_dim"),
}
# They would send the model elsewhere, start processes, or contradict what a run does with its data.
_NO_TRAINING_FIELDS = re.compile(
    "output_dir|resume_from_checkpoint|push_to_hub.*|hub_.*|deepspeed|fsdp.*|local_rank|do_.*|label_names|"
    "batch_eval_metrics|prediction_loss_only|include_for_metrics|remove_unused_columns"
)
_SYNONYMS = {
    "": {},
    "adapter": {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    "training": {
        "lr": "learning_rate",
        "steps": "max_steps",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "warmup": "warmup_steps",
    },
    "task": {"file": "train", "valid": "validation", "dev": "validation", "sentence": "text", "config": "name"},
}
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a section"}


def read_fields(file: YamlFields, folder: Path, to_train: bool) -> dict[str, Any]:
    """Check what a recipe holds, each field for itself.

    Args:
        file: The recipe's file, which gets the problems.
        folder: Where relative paths begin.
        to_train: Whether training fields and the data's files have to be there.

    Returns:
        Field -> checked value; paths are absolute.
    """
    source = partial(_check_source, folder, to_train)
    checks: dict[str, Check] = {
        "base_model": partial(_check_source, folder, True),
        "revision": check_text,
        "dtype": _check_dtype,
        "output_dir": check_text,
        "max_length": partial(_check_integer, maximum=2**20),
    }
    sections = ("adapter", "tasks", "max_rows", "trainer", "training", "card")
    fields = file.section((), checks | dict.fromkeys(sections, _anything), "a recipe", _misplaced())
    fields |= {
        "adapter": file.section(("adapter",), _adapter_checks(source), "HyperAdapterConfig", _SYNONYMS["adapter"]),
        "max_rows": file.section(("max_rows",), dict.fromkeys(SPLITS, _check_integer), "max_rows", {}),
        "trainer": file.section(("trainer",), _TRAINER_CHECKS, "HyperAdapterTrainer that a recipe sets", {}),
        "training": file.section(
            ("training",), _training_checks(), "TrainingArguments that a recipe sets", _SYNONYMS["training"]
        ),
        "card": file.section(("card",), _CARD_CHECKS, "a card", {}),
    }
    for keys in (("base_model",), ("adapter",), ("adapter", "task_type"), ("tasks",)):
        file.require(*keys)
    fields["tasks"] = _read_tasks(file, fields["adapter"].get("task_type"), folder, to_train)
    return fields


def _read_tasks(file: YamlFields, task_type: str | None, folder: Path, to_train: bool) -> dict[str, dict[str, Any]]:
    given = file.data.get("tasks") if isinstance(file.data, dict) else None
    if given is None:
        return {}
    if not isinstance(given, dict) or not given:
        file.refuse(("tasks",), f"tasks is {shown(given)}, but must hold a section for each task, under its name.")
        return {}
    tasks = {}
    for name, entry in given.items():
        try:
            check_task_name(name)
        except ValueError as error:
            file.refuse(("tasks", name), str(error))
            continue
        dataset = entry.get("dataset") if isinstance(entry, dict) else None
        checks = _task_checks(task_type, dataset is not None, folder, to_train)
        owner = f"a {task_type} task" if task_type else "a task"
        task = tasks[name] = file.section(("tasks", name), checks, owner, _SYNONYMS["task"])
        if to_train:
            file.require("tasks", name, "train")
        for other in {"name", "revision"} & task.keys():
            if dataset is None:
                file.refuse(("tasks", name, other), f"tasks.{name}.{other} belongs to a dataset, but none is given.")
    return tasks


def check_task_name(name: str) -> None:
    """Check for a name that a task can have in a recipe.

    Args:
        name: The name.

    Raises:
        ValueError: If it is empty, or taken for the mean over tasks.
    """
    if name == "mean" or not name.strip():
        raise ValueError(f"A task cannot have the name {name!r}. Choose another name.")


def _task_checks(task_type: str | None, has_dataset: bool, folder: Path, to_train: bool) -> dict[str, Check]:
    data = check_text if has_dataset else partial(check_file, folder, to_train)
    checks: dict[str, Check] = {
        "description": _check_one_or_more,
        **dict.fromkeys(SPLITS, data),
        "dataset": partial(_check_source, folder, to_train),
        "name": check_text,
        "revision": check_text,
    }
    if task_type != "CAUSAL_LM":
        checks |= {"text": check_text, "text_pair": check_text, "label": check_text, "labels": check_labels}
    if task_type != "SEQ_CLS":
        checks |= {"prompt": check_text, "completion": check_text}
    return checks


def _adapter_checks(source: Check) -> dict[str, Check]:
    names = {one.name for one in dataclasses.fields(HyperAdapterConfig)} - _NO_ADAPTER_FIELDS
    return dict.fromkeys(names, _anything) | {"task_type": _check_task_type, "text_encoder": source}


def _training_checks() -> dict[str, Check]:
    """The fields of ``TrainingArguments`` that a recipe may set, with a check of their types."""
    hints = typing.get_type_hints(TrainingArguments)
    kinds = {name: _kinds(hint) for name, hint in hints.items() if name in TrainingArguments.__dataclass_fields__}
    checks: dict[str, Check] = {
        name: partial(_check_kind, allowed)
        for name, allowed in kinds.items()
        if allowed and not _NO_TRAINING_FIELDS.fullmatch(name)
    }
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    return checks | dict.fromkeys(counts, _check_integer) | {"learning_rate": _check_not_negative}


def _kinds(hint: Any) -> set[type]:
    """What YAML can give for an annotation."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    kinds: set[type] = set()
    for part in parts:
        kind = typing.get_origin(part) or part
        if kind in _KINDS:
            kinds.add(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            kinds.add(str)
    return kinds


def _check_kind(allowed: set[type], name: str, value: Any) -> Any:
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        words = " or ".join(word for kind, word in _KINDS.items() if kind in allowed)
        quotes = " Put it in quotes." if str in allowed else ""
        raise TypeError(f"{name}={shown(value)} must be {words}, not {type(value).__name__}.{quotes}")
    return value


def _misplaced() -> dict[str, str]:
    """Fields of sections -> their full names, for those who write them at the top."""
    names = {name: f"adapter.{name}" for name in _adapter_checks(check_text)}
    names |= {name: f"training.{name}" for name in _training_checks()}
    return names | {name: f"trainer.{name}" for name in _TRAINER_CHECKS}


def _anything(name: str, value: Any) -> Any:
    return value


def _check_integer(name: str, value: Any, maximum: int = _LARGE) -> Any:
    check_integer(name, value, maximum)
    return value


def _check_not_negative(name: str, value: Any) -> Any:
    check_number(name, value, "a finite number of at least 0", lambda number: number >= 0)
    return value


def _check_bool(name: str, value: Any) -> Any:
    check_type(name, value, bool, "true or false", optional=False)
    return value


def _check_dtype(name: str, value: Any) -> Any:
    check_choice(name, value, _DTYPES)
    return value


def _check_task_type(name: str, value: Any) -> Any:
    check_choice(name, value, TASK_TYPES)
    return value


def _check_one_or_more(name: str, value: Any) -> str | tuple[str, ...]:
    texts = check_texts(name, value)
    return texts if isinstance(value, list) else texts[0]


def check_labels(name: str, value: Any) -> tuple[str, ...]:
    """Check for names of labels.

    Args:
        name: The field.
        value: Its value.

    Returns:
        The names.

    Raises:
        TypeError: If it is no list of texts.
        ValueError: If a name is empty, or there twice.
    """
    if not isinstance(value, list):
        raise TypeError(f"{name}={shown(value)} must be a list of names, not {type(value).__name__}.")
    labels = check_texts(name, value)
    if len(set(labels)) < len(labels):
        raise ValueError(f"{name}={shown(value)} holds a name twice. Give every label a name of its own.")
    return labels


def _check_source(folder: Path, must_exist: bool, name: str, value: Any) -> str:
    """A name on the Hub, or a folder by its absolute path."""
    text = check_text(name, value)
    path = folder / Path(text).expanduser()
    if path.is_dir():
        return str(path.resolve())
    try:
        validate_repo_id(text)
    except HFValidationError:
        if not must_exist:
            return text
        raise ValueError(f"{name}={shown(text)} is neither a folder ({path}) nor a name on the Hub.") from None
    return text


def check_file(folder: Path, must_exist: bool, name: str, value: Any) -> str:  # noqa: DOC503
    """Check for a file with data.

    Args:
        folder: Where relative paths begin.
        must_exist: Whether the file has to be there.
        name: The field.
        value: Its value.

    Returns:
        The absolute path.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is no file, or of an unknown kind.
    """
    text = check_text(name, value)
    path = (folder / Path(text).expanduser()).resolve()
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{name}={shown(text)} has an unknown ending. Give a file of {', '.join(_SUFFIXES)}, or name a dataset and "
            "one of its splits."
        )
    if must_exist and not path.is_file():
        raise ValueError(f"{name}={shown(text)} is no file: there is none at {path}.")
    return str(path)


_TRAINER_CHECKS: dict[str, Check] = {
    "temperature": _anything,
    "max_tasks_per_batch": _anything,
    "log_task_losses": _check_bool,
    "log_positions": _check_bool,
}
_CARD_CHECKS: dict[str, Check] = {
    "title": check_text,
    "base_model": check_text,
    "license": check_text,
    "language": _check_one_or_more,
    "limits": check_texts,
    "tags": check_texts,
}
