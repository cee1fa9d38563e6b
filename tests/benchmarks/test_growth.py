"""The growth study counts what it says it counts, and fits exponents."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.common.rows import read_rows
from benchmarks.growth import __main__ as growth
from benchmarks.growth.__main__ import saved_bytes
from benchmarks.growth.report import QUANTITIES, curve, exponent


def test_exponent_of_a_power() -> None:
    assert exponent([1, 10, 1000], [3 * size**0.7 for size in (1, 10, 1000)]) == pytest.approx(0.7)
    # Least squares: of 1, 2 and 8 over 1, 2 and 4, the slope of 0, 1, 3 over 0, 1, 2.
    assert exponent([1, 2, 4], [1, 2, 8]) == pytest.approx(1.5)


def test_saved_bytes_by_hand() -> None:
    linear, x = nn.Linear(6, 4), torch.ones(5, 6)
    # Its input, for the gradient of the weight, which is a parameter and does not count.
    assert saved_bytes(linear, lambda: linear(x).sum()) == 4 * 5 * 6
    # The output of tanh, once, though tanh and the square both save it.
    assert saved_bytes(linear, lambda: linear(x).tanh().square().sum()) == 4 * (5 * 6 + 5 * 4)
    assert saved_bytes(linear.requires_grad_(False), lambda: linear(x).sum()) == 0


def test_fast_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["growth", "--fast", "--output", str(tmp_path)])
    growth.main()
    rows = read_rows(tmp_path / "growth.jsonl")
    assert len(rows) == 3 * 2 * 2
    one, many = ([row for row in rows if row["axis"] == "tasks" and row["tasks"] == tasks] for tasks in (1, 3))

    # A LoRA of rank 2 at one layer: query and output 32 x 32, key and value 32 x 16, and three of the MLP, 32 x 88.
    assert one[1]["parameters"] == 2 * (2 * 64 + 2 * 48 + 3 * 120)
    for name in ("parameters", "folder_bytes"):
        assert many[1][name] == 3 * one[1][name]
    # Float32, and a header and a configuration beside it.
    assert one[1]["folder_bytes"] > 4 * one[1]["parameters"]
    # Two more loaded LoRAs: parameters and two moments in float32.
    assert many[1]["step_bytes"] - one[1]["step_bytes"] == 2 * 12 * one[1]["parameters"]
    # It is one measurement.
    assert many[1]["step_seconds"] == one[1]["step_seconds"]
    # A task is an embedding of 64 numbers.
    assert many[0]["parameters"] - one[0]["parameters"] == 2 * 64
    for row in rows:
        for name in ("step_seconds", "adapter_seconds"):
            assert 0 < row[name][0] <= row[name][1] <= row[name][2]

    lines = capsys.readouterr().out.splitlines()
    places = [index for index, line in enumerate(lines) if "times as p50" in line]
    titles = ["tasks, at rank 2, layers 1", "rank, at tasks 3, layers 1", "layers, at tasks 3, rank 2"]
    assert [lines[place].split(";")[0] for place in places] == titles
    for axis, place in zip(("tasks", "rank", "layers"), places, strict=True):
        table = lines[place + 2 : place + 2 + 2 * len(QUANTITIES)]
        expected = [
            exponent(*curve(rows, axis, method, quantity)) for quantity in QUANTITIES for method in growth.METHODS
        ]
        assert [float(line.split()[-1]) for line in table] == pytest.approx(expected, abs=0.0051)
    assert {path.name for path in tmp_path.iterdir()} == {"growth.jsonl", "growth.svg"}
