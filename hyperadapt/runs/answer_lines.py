"""Answers to rows as JSON objects, one in each line of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperadapt.files import write_whole


def classified(task: str, texts: Sequence[str], scores: Mapping[str, float], expected: str | None) -> dict[str, Any]:
    """What a classifier answers to one or two texts: the likeliest label, and the probability of each."""
    label = max(scores, key=lambda name: scores[name])
    line = {"task": task, **dict(zip(("text", "text_pair"), texts, strict=False))}
    return _with_expected({**line, "label": label, "score": scores[label], "scores": dict(scores)}, expected)


def completed(task: str, prompt: Any, completion: str, expected: str | None) -> dict[str, Any]:
    """What a language model writes after a prompt."""
    return _with_expected({"task": task, "prompt": prompt, "completion": completion}, expected)


def write_predictions(path: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write answers, all of them or none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def _with_expected(line: dict[str, Any], expected: str | None) -> dict[str, Any]:
    return line if expected is None else {**line, "expected": expected}
