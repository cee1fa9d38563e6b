"""The quickstart runs from data to exported LoRA; far too short here to learn anything."""

import re
from pathlib import Path

import pytest

from examples import quickstart
from examples.support.text_tasks import encoder_path
from tests.support.card_schema import ROOT, check_example_card


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    # For the process that predicts.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("sys.argv", ["quickstart", "--rows", "100", "--steps", "2"])
    quickstart.main()
    output = capfd.readouterr().out
    assert "reloaded in a fresh process: predictions identical" in output
    assert "loaded by plain peft: logits differ by" in output
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(r"mean accuracy: linear probe 0\.\d{3}, hyperadapter 0\.\d{3} over 7 tasks", last)
    assert Path("runs/quickstart/lora-trec6/adapter_config.json").exists()
    check_example_card(Path("runs/quickstart/hyperadapter"), "quickstart")
