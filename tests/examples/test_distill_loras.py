"""The distillation example runs from data to table; far too short here to learn anything."""

import re
from pathlib import Path

import pytest

from benchmarks.common.rows import read_rows
from examples import distill_loras
from examples.support.text_tasks import encoder_path
from tests.support.card_schema import check_example_card


def test_distill_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["distill_loras", "--fast"])
    distill_loras.main()
    lines = capfd.readouterr().out.strip().splitlines()
    names = distill_loras.TASKS[:3]
    assert [line.split(":")[0] for line in lines[:3]] == list(names)
    assert {line.split()[0] for line in lines[5:8]} == set(names)
    assert re.fullmatch(r"gain in accuracy kept: -?[\d.]+% of -?0\.\d{3} per task", lines[-2])
    folder = tmp_path / "runs" / "distill_loras"
    check_example_card(Path("runs/distill_loras/hyperadapter"), "distill_loras")
    loras = [path.stat().st_size for path in sorted((folder / "loras").glob("*/adapter_model.safetensors"))]
    size = (folder / "hyperadapter" / "adapter_model.safetensors").stat().st_size
    assert lines[-1] == f"size: {size:,} bytes instead of {sum(loras):,}, {size / sum(loras):.1%}"
    rows = read_rows(folder / "rows.jsonl")
    assert [row["task"] for row in rows] == list(names)
    trained = [path.stat().st_mtime_ns for path in sorted((folder / "loras").rglob("*.safetensors"))]

    monkeypatch.setattr("sys.argv", ["distill_loras", "--fast", "--reuse-loras"])
    distill_loras.main()
    assert [path.stat().st_mtime_ns for path in sorted((folder / "loras").rglob("*.safetensors"))] == trained
    again = read_rows(folder / "rows.jsonl")
    assert [row["distilled"] for row in again] == [row["distilled"] for row in rows]
