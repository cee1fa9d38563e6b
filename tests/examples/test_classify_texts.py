"""The example of labels runs from data to names; far too short here to learn anything."""

import re
from pathlib import Path

import pytest

from examples import classify_texts
from examples.support.text_tasks import encoder_path


def test_classify_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["classify_texts", "--rows", "40", "--steps", "2", "--batch-size", "6"])
    classify_texts.main()
    lines = capfd.readouterr().out.strip().splitlines()[-9:]
    assert [line.split()[:2] for line in lines[:4]] == [
        ["task", "labels"], ["trec6", "6"], ["sms_spam", "2"], ["movie_sent", "2"]
    ]  # fmt: skip
    assert re.match(r"sms_spam +(spam|not spam) \(\d\.\d\d\): Congratulations", lines[6]), lines[6]
    assert re.match(r"movie_sent +(positive|negative) \(\d\.\d\d\): Two hours", lines[7]), lines[7]
