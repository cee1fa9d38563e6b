"""The example of the harness, on the harness's stand-in and on a model far too small to learn anything."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")

from examples.support.causal_lm import load_tokenizer
from examples.support.text_tasks import encoder_path
from tests.examples.test_grpo_tasks import small_model
from tests.support import lm_eval_standin

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
MODULES = ("hyperadapt.runs.harness", "examples.evaluate_harness")


def test_evaluate_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
        load_tokenizer()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    lm_eval_standin.install(monkeypatch)
    for name in MODULES:
        sys.modules.pop(name, None)
    example = importlib.import_module(MODULES[1])
    monkeypatch.setattr(example, "load_base", small_model)
    options = ["--steps", "1", "--rows", "8", "--test-rows", "2", "--batch-size", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["evaluate_harness", *options])
    try:
        example.main()
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
    head, *rows = [line.split() for line in capsys.readouterr().out.strip().splitlines()[-4:]]
    assert head == ["accuracy", "before", "after"]
    assert [row[0] for row in rows] == list(example.TASKS)
    assert all(float(score) in (0, 0.5, 1) for row in rows for score in row[1:])
