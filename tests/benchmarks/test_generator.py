"""The benchmark of LoRAs without their base runs, and its numbers are what they are called; times mean nothing here."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import generator
from benchmarks.common.rows import read_rows
from hyperadapt import LoraGenerator
from tests.support.helpers import ROOT


def test_fast_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("sys.argv", ["generator", "--fast", "--output", str(tmp_path)])
    generator.main()
    rows = read_rows(tmp_path / "generator.jsonl")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == len(rows) == 6
    assert [row.get("process") for row in rows[:3]] == ["import peft", "export", "export with the base model"]
    assert all(row["seconds"] > 0 for row in rows if row["measure"] != "many")
    # A process of PyTorch takes that much.
    assert all(100 < row["peak_mb"] < 10_000 for row in rows if "peak_mb" in row)
    [many] = [row for row in rows if row["measure"] == "many"]
    assert many["ratio"] == pytest.approx(many["save_all_per_second"] / many["safetensors_per_second"])


def test_an_adapter_has_the_shapes_of_its_model(tmp_path: Path) -> None:
    generator.save_adapter("tiny", tmp_path, 3)
    made = LoraGenerator.from_pretrained(tmp_path)
    assert made.tasks == ["task 0", "task 1", "task 2"]
    assert made.r == 16
    assert len(made.network.positions) == 14
    state = made.state_dict("task 1")
    assert state["base_model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (16, 48)
    assert all(tensor.any() for tensor in state.values())


def test_a_process_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="python -c raise SystemExit\\(3\\) ended with 3"):
        generator.process(["-c", "raise SystemExit(3)"])
