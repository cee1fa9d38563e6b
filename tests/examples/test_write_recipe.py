"""The written recipe is one that can be trained; far too short here to learn anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import write_recipe
from examples.support.text_tasks import load_task
from hyperadapt.recipes import load_recipe
from hyperadapt.runs import add_task, evaluate, train
from tests.support.helpers import minilm


def test_write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = minilm()
    tasks = ["tweet_sent", "stereoset_rel", "bbc"]
    options = ["--tasks", *tasks, "--rows", "40", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["write_recipe", str(tmp_path), *options])
    write_recipe.main()
    assert capsys.readouterr().out == f"hyperadapt train {tmp_path / 'recipe.yaml'}\n"

    recipe = load_recipe(tmp_path / "recipe.yaml", output_dir=tmp_path / "run")
    assert list(recipe.tasks) == tasks
    assert recipe.base_model == str(Path(base).resolve())
    assert recipe.tasks["bbc"].description == load_task("bbc").descriptions
    pair = json.loads((tmp_path / "stereoset_rel" / "train.jsonl").read_text().splitlines()[0])
    assert list(pair) == ["text", "text_pair", "label"]

    run = train(recipe, report=None, figures=False)
    assert len(run.recipe.labels) == 2 + 2 + 5
    assert {task: values["rows"] for task, values in run.record.results["tasks"].items()} == dict.fromkeys(tasks, 20)
    held_out = tmp_path / write_recipe.HELD_OUT
    add_task(
        run,
        write_recipe.HELD_OUT,
        description=load_task(write_recipe.HELD_OUT).description,
        labels=["positive", "negative"],
        test=held_out / "test.jsonl",
    )
    assert evaluate(run, tasks=[write_recipe.HELD_OUT])["tasks"][write_recipe.HELD_OUT]["rows"] == 20
    assert len((held_out / "examples.jsonl").read_text().splitlines()) == write_recipe.EXAMPLES
