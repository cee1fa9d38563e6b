"""The multi-task example runs from data to table; far too short here to learn anything."""

import re
from pathlib import Path

import pytest

from examples import train_multitask
from examples.support.text_tasks import encoder_path
from tests.support.card_schema import check_example_card


def test_train_multitask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    options = ["--rows", "40", "--steps", "2", "--batch-size", "10"]
    monkeypatch.setattr("sys.argv", ["train_multitask", *options])
    train_multitask.main()
    lines = capfd.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"mean test accuracy: 0\.\d{3} over 10 tasks", lines[-1])
    assert re.fullmatch(r"best checkpoint: checkpoint-\d of 2 steps", lines[-3])
    table = {line.split()[0]: line.split()[1:] for line in lines[-14:-4]}
    assert set(table) == set(train_multitask.TASKS)
    mean = sum(float(columns[3]) for columns in table.values()) / 10
    assert abs(mean - float(lines[-1].split()[3])) < 1e-3
    check_example_card(next(Path("runs").glob("*/hyperadapter")), "train_multitask")
