"""Records are read back or refused, and files of a folder are replaced together or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from hyperadapt.runs.record import RECORD, Record, hardware, replaced_together, versions

RECORDED = Record({"steps": 3, "rows": {"a": 5}}, {"split": "test", "tasks": {}}, [{"loss": 0.1, "step": 1}])


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_record_is_read_back(tmp_path: Path) -> None:
    RECORDED.save(tmp_path)
    assert Record.load(tmp_path) == RECORDED
    assert os.listdir(tmp_path) == [RECORD]


def test_numbers_that_json_lacks_become_none(tmp_path: Path) -> None:
    Record({"a": math.nan}, {"b": {"c": -math.inf}}, [{"d": (1.5, math.inf)}]).save(tmp_path)
    assert Record.load(tmp_path) == Record({"a": None}, {"b": {"c": None}}, [{"d": [1.5, None]}])


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{}", '{"training": 5, "results": {}, "log_history": []}', "[" * 99999]
)
def test_another_file_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / RECORD} is no record of a run (")):
        Record.load(tmp_path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no record.json. Name the folder that a training")):
        Record.load(tmp_path)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    RECORDED.save(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        Record({"a": object()}, {}, []).save(tmp_path)
    assert Record.load(tmp_path) == RECORDED


def test_what_a_run_was_made_with() -> None:
    assert re.fullmatch(r"\d+ threads of .+", hardware(torch.device("cpu")))
    found = versions()
    assert list(found) == ["python", "hyperadapt", "torch", "transformers", "peft"]
    # Builds differ in whether the package's own version names the local one.
    assert torch.__version__.startswith(found["torch"])
    assert json.dumps(found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "mine", RECORD):
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path


def write(new: Path) -> None:
    for name in (RECORD, "b", "c"):
        (new / name).write_text(f"new {name}")
    (new / "a").mkdir()
    (new / "a" / "inner").write_text("new inner")


def test_files_are_replaced_and_others_are_kept(folder: Path) -> None:
    with replaced_together(folder) as new:
        write(new)
        assert contents(folder)["b"] == "old b"
    assert contents(folder) == {
        "a/inner": "new inner",
        "b": "new b",
        "c": "new c",
        "mine": "old mine",
        RECORD: f"new {RECORD}",
    }
    assert sorted(os.listdir(folder)) == ["a", "b", "c", "mine", RECORD]


def test_a_failure_while_writing_changes_nothing(folder: Path) -> None:
    def write_and_fail() -> None:
        with replaced_together(folder) as new:
            write(new)
            raise OSError("disk full")

    before = contents(folder)
    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert contents(folder) == before


def test_the_record_comes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = renames(monkeypatch, None)
    with replaced_together(folder) as new:
        write(new)
    # Three files are moved out of the way, and four are put there.
    assert [target.name for target in calls] == ["a", "a", "b", "b", "c", RECORD, RECORD]


@pytest.mark.parametrize("failing", range(7))
def test_a_failure_while_replacing_changes_nothing(folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    renames(monkeypatch, failing)
    with pytest.raises(OSError, match="disk full"), replaced_together(folder) as new:
        write(new)
    assert contents(folder) == before


def renames(monkeypatch: pytest.MonkeyPatch, failing: int | None) -> list[Path]:
    """The targets of the calls of ``os.rename`` from here on, of which one fails."""
    rename, calls = os.rename, []

    def renamed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) - 1 == failing:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    return calls
