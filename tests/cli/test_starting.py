"""From data files to a recipe, and what its training would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine
from tests.support.tiny_runs import contents, write_recipe


def test_a_starter_for_people_and_for_machines(
    hyperadapt: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path, "SEQ_CLS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    lines = hyperadapt("init", "data", "--base-model", "base").splitlines()
    assert lines[0] == "letters: texts in 'text', 2 labels in 'label'; train, validation, test"
    assert lines[-1] == "written to recipe.yaml; look at it, and then: hyperadapt train recipe.yaml --dry-run"
    before = contents(tmp_path)
    hyperadapt("init", "data", code=2)
    assert "is there already" in hyperadapt.stderr
    assert contents(tmp_path) == before
    found = hyperadapt.json("init", "data", "--output", "other.yaml")
    assert (found["recipe"], found["task_type"], found["tasks"]) == (
        "other.yaml",
        "SEQ_CLS",
        ["letters", "mail", "reviews"],
    )
    assert len(found["guesses"]) == 5

    before = contents(tmp_path)
    text = hyperadapt("train", "recipe.yaml", "--dry-run")
    assert contents(tmp_path) == before
    for pattern in (
        r"^\S+/base, SEQ_CLS$",
        r"^7 modules are adapted: 1 x query, ",
        r"^[\d,]+ of [\d,]+ parameters are trained$",
        r"^12 steps of 32 rows of at most 32 tokens, to runs/recipe$",
        r"^mail +40 +12 +16 +\d tokens +2: ",
        r"^letters, the first row to train on$",
        r"^  text: '\[CLS\] .* \[SEP\]'$",
        r"^  label: '(positive|negative)'$",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern
    assert text.endswith("\nEverything was checked. Nothing was trained or written.\n")
    found = hyperadapt.json("train", "recipe.yaml", "--dry-run", "--output", "elsewhere")
    assert found["folder"] == "elsewhere"
    assert found["tasks"]["mail"]["rows"] == {"train": 40, "validation": 12, "test": 16}
    assert contents(tmp_path) == before
