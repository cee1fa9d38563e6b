"""The continual study trains each arm as it says, resumes, and its report says what follows from the rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.rows import read_rows
from benchmarks.continual import __main__ as continual
from benchmarks.continual import arms as continual_arms
from benchmarks.continual.arms import Arm, drawn
from benchmarks.continual.report import report
from benchmarks.stability.data import Row
from tests.support.helpers import minilm


def row(seed: int, after: float, **values: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "arm": "LoRA, replay",
        "rate": 0.002,
        "before": {"a": 0.8, "b": 0.6},
        "after": {"a": after, "b": 0.7},
        "new": 0.5,
        "identical": False,
        **values,
    }


def test_fast_form_runs_resumes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    minilm()
    arms = {
        name: Arm(arm.kind, arm.replay, arm.way, arm.rates[-1:])
        for name, arm in continual.ARMS.items()
        if name not in ("hyperadapter, no replay", "LoRA, replay")
    }
    monkeypatch.setattr(continual, "ARMS", arms)
    command = ["continual", "--fast", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    continual.main()
    assert capsys.readouterr().out.count("seed 0 arm ") == 5
    rows = {row["arm"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert {name: row["identical"] for name, row in rows.items()} == {
        "hyperadapter, replay": False,
        "hyperadapter, exact": True,
        "hyperadapter, embedding alone": True,
        "LoRA, no replay": False,
        "LoRA, and an own one": True,
    }
    assert {row["new_task"] for row in rows.values()} == {"stereoset_rel"}
    assert rows["hyperadapter, exact"]["before"].keys() == {"movie_sent", "sms_spam"}
    # Of one size.
    assert rows["LoRA, no replay"]["parameters"] == pytest.approx(rows["hyperadapter, exact"]["parameters"], rel=0.02)
    continual.main()
    assert "seed 0" not in capsys.readouterr().out
    monkeypatch.setitem(continual.FAST, "steps", 3)
    with pytest.raises(SystemExit, match=r"has rows with steps=2, not 3\. Choose another --output\."):
        continual.main()


def test_half_of_the_rows_are_of_known_tasks() -> None:
    groups = [[Row(torch.zeros(1, 2), 0, task)] * count for task, count in ((1, 3), (0, 40))]
    tasks = torch.cat([batch["tasks"] for batch in drawn(groups, 10, seed=0)])
    assert torch.bincount(tasks).tolist() == [5 * continual_arms.BATCH_SIZE] * 2


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([row(0, 0.7), row(1, 0.5), row(0, 0.8, arm="LoRA, no replay", identical=True)], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0] == "arm"
    assert " ".join(lines[1].split()).endswith("rate known, before known, after change worst change new exact seeds")
    assert "0.700 ± 0.000" in lines[2]
    assert "0.650 ± 0.635" in lines[2]
    assert "-0.050 ± 0.635" in lines[2]
    assert "-0.200 ± 1.271" in lines[2]
    assert lines[2].split()[-2:] == ["no", "2"]
    assert lines[3].split()[-2:] == ["yes", "1"]
    assert "LoRA, replay minus LoRA, no replay, 0.002: change -0.050, worst change -0.100, new +0.000" in lines
    assert len(read_rows(tmp_path / "continual.jsonl")) == 3
    with pytest.raises(ValueError, match=r"rows=\[\]: there is nothing to report yet"):
        report([], tmp_path)
