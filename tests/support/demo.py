"""The demo's adapter, trained for a step or two on one corpus."""

from pathlib import Path

import pytest

from examples.space import train
from examples.support.text_tasks import encoder_path


def trained_demo(folder: Path) -> Path:
    """The folder that the command writes; skips the test where the data is not installed."""
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        options = ("--steps", "2", "--texts", "40", "--corpora", "articles", "--output", str(folder))
        patch.setattr("sys.argv", ["train", *options])
        train.main()
    return folder
