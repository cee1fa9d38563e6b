"""The record of a run."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hyperadapt.files import finite, write_whole
from hyperadapt.recipes.rows import TaskRows

RECORD = "record.json"
_LETTERS = 300
# Of a record's results, the splits that tell most first.
TOLD = ("test", "validation", "train")
_PACKAGES = ("hyperadapt", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Record:
    """What a run did and how well: ``record.json``.

    Args:
        training: Facts: steps, epochs, batch size, rows, seconds, hardware, versions and the like.
        results: What ``evaluate`` returned, of the test split; else of the validation split, else of the training rows.
        log_history: What ``Trainer`` logged.
        prompts: Task -> an input of it, for the card: a text, two texts, or the messages of a chat.
        other_results: What it returned of the other splits, by split.
    """

    training: Mapping[str, Any]
    results: Mapping[str, Any]
    log_history: Sequence[Mapping[str, Any]]
    prompts: Mapping[str, Any] = field(default_factory=dict)
    other_results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_results(self, results: Mapping[str, Any]) -> Record:
        """The record with the results of a split, in place of those that it had of that split.

        Args:
            results: What ``evaluate`` returned.

        Returns:
            A new record, whose ``results`` are those of the split that tells most.
        """
        known = {self.results.get("split", "test"): self.results} if self.results else {}
        by_split = {**known, **self.other_results, results["split"]: results}
        first = min(by_split, key=lambda split: TOLD.index(split) if split in TOLD else len(TOLD))
        others = {split: one for split, one in by_split.items() if split != first}
        return replace(self, results=by_split[first], other_results=others)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Record:
        """Read the record of a run.

        Args:
            folder: The run's folder.

        Returns:
            The record; numbers that were not finite are None.

        Raises:
            ValueError: If there is none, or the file holds something else.
        """
        path = Path(folder, RECORD)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                dict(fields["training"]),
                dict(fields["results"]),
                list(fields["log_history"]),
                dict(fields.get("prompts") or {}),
                dict(fields.get("other_results") or {}),
            )
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {RECORD}. Name the folder that a training run wrote.") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no record of a run ({error!r}). Train anew, or restore the file.") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the record, complete or not at all.

        Args:
            folder: The run's folder, which exists.
        """
        text = json.dumps(finite(vars(self)), indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(Path(folder, RECORD), f"{text}\n")


def prompt_of(rows: TaskRows, task_type: str) -> Any:
    """The first input of a task, shortened: a text, two texts, or the messages of a chat."""
    texts = rows.texts[0][:1] if task_type == "CAUSAL_LM" else rows.texts[0]
    if isinstance(texts[0], list):
        return [{"role": one["role"], "content": _shortened(str(one["content"]))} for one in texts[0]]
    short = [_shortened(text) for text in texts]
    return short[0] if len(short) == 1 else short


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _LETTERS, placeholder=" ...") if len(text) > _LETTERS else text


def hardware(device: torch.device) -> str:
    """What a model was trained on: number and name of the GPUs, or of the CPU's threads."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        count = torch.get_num_threads()
        return f"{count} thread{'s' if count > 1 else ''} of {_processor()}"
    return str(device)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for a run, by name."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
