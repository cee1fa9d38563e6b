"""One `hyperadapt train` loads the base model, measures the adapter, reads and writes each file once."""

from __future__ import annotations

import builtins
import io
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import peft_model
from transformers import AutoModelForSequenceClassification

from hyperadapt import diagnosis
from hyperadapt.files import UNFINISHED
from hyperadapt.runs.report import FIGURES
from hyperadapt_cli import training as commands
from tests.support.tiny_runs import FILES, write_recipe

SPLITS = ("train", "validation", "test")

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


class Counters:
    """Counts calls of functions by what they are for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.counts: Counter[Any] = Counter()

    def watch(self, owner: Any, name: str, purpose: Callable[..., Any]) -> None:
        """Count calls of a function by the purpose, unless that is None."""
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = purpose(*args)
            self.counts.update(() if found is None else [found])
            return original(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, counted)


def final_name(run: Path, path: object) -> str | None:
    """Name in the folder of a run that a file has in the end; None for what is no part of the finished run."""
    if not isinstance(path, str | os.PathLike) or not Path(path).is_relative_to(run):
        return None
    parts = Path(path).relative_to(run).parts
    if len(parts) > 1 and parts[0].startswith(UNFINISHED):
        parts = parts[2:]
    return None if parts[:1] == ("checkpoints",) else re.sub(rf"{re.escape(UNFINISHED)}\w+-", "", "/".join(parts))


def test_everything_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(tmp_path, "SEQ_CLS"), tmp_path / "run"
    counters = Counters(monkeypatch)

    def opened(path: Any, mode: str = "r", *_: Any) -> Any:
        if "r" in mode:
            return ("read", Path(path)) if str(path).endswith(".jsonl") else None
        name = final_name(run, path)
        return None if name is None else ("write", name)

    def moved(source: Path, target: Path, *_: Any) -> Any:
        # Only what appears in the run's folder, not what is taken away from there.
        is_new = UNFINISHED in str(source) and UNFINISHED not in str(target)
        name = final_name(run, target) if is_new else None
        return None if name is None else ("move", name)

    for owner in (io, builtins):
        counters.watch(owner, "open", opened)
    for name in ("rename", "replace"):
        counters.watch(os, name, moved)
    counters.watch(peft_model, "safe_save_file", lambda tensors, path: opened(path, "w"))
    counters.watch(AutoModelForSequenceClassification, "from_pretrained", lambda *args: "load")
    counters.watch(diagnosis, "_measure", lambda *args: "measure")
    commands.train(recipe)
    monkeypatch.undo()

    counts, figures = counters.counts, {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert counts["load"] == counts["measure"] == 1
    data = {tmp_path / "data" / task / f"{split}.jsonl" for task in ("reviews", "letters", "mail") for split in SPLITS}
    assert {key[1]: count for key, count in counts.items() if key[0] == "read"} == dict.fromkeys(data, 1)
    # The library that writes tokenizer.json opens it itself.
    written = {key[1]: count for key, count in counts.items() if key[0] == "write"}
    # The record once more after the test, which may fail.
    again = {"record.json": 2}
    assert written == dict.fromkeys({*FILES, *figures} - {"tokenizer.json"}, 1) | again
    moves = {key[1]: count for key, count in counts.items() if key[0] == "move"}
    assert moves == dict.fromkeys([*FILES, "figures"], 1) | again
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {*FILES, *figures}
    assert "saved to" in capsys.readouterr().out
