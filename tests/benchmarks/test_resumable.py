"""Studies of many runs: what is missing, when the time is up, and rows of another study."""

import time
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.common.resumable import Runs
from benchmarks.common.rows import Row


class OneRun(NamedTuple):
    stage: str
    arm: str
    seed: int


RUNS = [OneRun("test", arm, seed) for arm in ("a", "b") for seed in (1, 2)]


def measure(run: OneRun) -> Row:
    return {"loss": run.seed, "cpu_seconds": 0.0}


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    study = Runs(tmp_path / "new" / "rows.jsonl", "abc", OneRun)
    assert study.missing(RUNS) == RUNS
    assert study.go_on(RUNS[:2], measure, float("inf"))
    again = Runs(study.path, "abc", OneRun)
    assert again.missing(RUNS) == RUNS[2:]
    assert again.go_on(RUNS, measure, float("inf"))
    assert [study.run_of(row) for row in study.rows()] == RUNS
    assert [row["loss"] for row in study.rows()] == [1, 2, 1, 2]
    with pytest.raises(SystemExit, match="has rows of another definition of the study, abc, which is def now"):
        Runs(study.path, "def", OneRun).rows()


def test_no_run_begins_that_would_end_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Runs(tmp_path / "rows.jsonl", "abc", OneRun)

    def slow(run: OneRun) -> Row:
        time.sleep(0.2)
        return measure(run)

    # Of each arm, only a first run tells how long the next one takes.
    assert not study.go_on(RUNS, slow, time.monotonic() + 0.3)
    assert [study.run_of(row) for row in study.rows()] == RUNS[:1]
    assert "stopped: the time is up" in capsys.readouterr().out
