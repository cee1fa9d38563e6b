"""Records are read back or refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from hyperadapt.runs.record import RECORD, Record, hardware, versions

RECORDED = Record(
    {"steps": 3, "rows": {"a": 5}},
    {"split": "test", "tasks": {}},
    [{"loss": 0.1, "step": 1}],
    {"train": {"split": "train", "tasks": {}}},
)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_record_is_read_back(tmp_path: Path) -> None:
    RECORDED.save(tmp_path)
    assert Record.load(tmp_path) == RECORDED
    assert os.listdir(tmp_path) == [RECORD]


def test_numbers_that_json_lacks_become_none(tmp_path: Path) -> None:
    Record({"a": math.nan}, {"b": {"c": -math.inf}}, [{"d": (1.5, math.inf)}]).save(tmp_path)
    assert Record.load(tmp_path) == Record({"a": None}, {"b": {"c": None}}, [{"d": [1.5, None]}])


def test_a_record_of_before_has_results_of_one_split(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"training": {}, "results": {"split": "test"}, "log_history": []}')
    assert Record.load(tmp_path) == Record({}, {"split": "test"}, [])


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


def test_what_a_run_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, words in ((1, "1 thread"), (3, "3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert re.fullmatch(rf"{words} of .+", hardware(torch.device("cpu")))
    found = versions()
    assert list(found) == ["python", "hyperadapt", "torch", "transformers", "peft"]
    # Builds differ in whether the package's own version names the local one.
    assert torch.__version__.startswith(found["torch"])
    assert json.dumps(found)
