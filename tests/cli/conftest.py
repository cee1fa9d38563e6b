"""What the tests of the command line share."""

import pytest
from transformers.utils import logging

from tests.support.command_line import CommandLine


@pytest.fixture
def hyperadapt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    # As in a fresh process; other tests turn them off.
    logging.enable_progress_bar()
    return CommandLine(monkeypatch, capsys)
