"""The example adds a task in both ways; far too short here to learn anything."""

import re
from pathlib import Path

import pytest

from examples import continual_tasks
from hyperadapt.runs import load_record, load_run
from tests.support.helpers import minilm


@pytest.mark.slow
def test_continual_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    minilm()
    options = ["--tasks", "movie_sent", "stereoset_rel", "--rows", "20", "--steps", "1", "--new-steps", "1"]
    monkeypatch.setattr("sys.argv", ["continual_tasks", *options, "--output", str(tmp_path)])
    continual_tasks.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["test", "accuracy", "before", "replay", "exact"]
    before, after = re.fullmatch(r"stereoset_rel +([\d.]+) +[\d.]+ +([\d.]+)", lines[-2]).groups()
    assert before == after
    assert re.fullmatch(r"nyt_sent +[\d.]+ +[\d.]+", lines[-1])
    assert load_record(tmp_path / "replay").training["added_tasks"]["nyt_sent"]["replayed_rows"] == 40
    assert load_run(tmp_path / "exact").recipe.adapter_config.task_names == ["movie_sent", "stereoset_rel", "nyt_sent"]
