"""Training: resumed, overwritten or refused, and what it does with its folder."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hyperadapt.recipes import RecipeError, load_recipe
from hyperadapt.runs import Record, load_run, train
from hyperadapt.runs import training as runs_training
from tests.support.tiny_runs import FILES, WEIGHTS, contents, recipe, silent, stopped, training, write_rows
from tests.support.tolerances import FLOAT32_FORWARD

ADAPTER_WITH_DROPOUT = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 2, "lora_dropout": 0.1}


def timeless(record: Record) -> tuple[Any, ...]:
    facts = {name: value for name, value in record.training.items() if name != "seconds"}
    # Trainer's mean over the whole training knows only the last process's steps.
    others = ("runtime", "per_second", "train_loss")
    history = [
        {name: value for name, value in entry.items() if not name.endswith(others)} for entry in record.log_history
    ]
    return facts, record.results, history


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    made = recipe(tmp_path, adapter=ADAPTER_WITH_DROPOUT)
    whole, parts = replace(made, output_dir=str(tmp_path / "whole")), replace(made, output_dir=str(tmp_path / "parts"))
    silent(whole)
    stopped(parts, "step 5 of 10: loss", resume=True)
    assert sorted(os.listdir(tmp_path / "parts" / "checkpoints")) == ["checkpoint-2", "checkpoint-4", "recipe.yaml"]
    stopped(parts, "step 9 of 10: loss", resume=True)
    assert silent(parts, resume=True) == tmp_path / "parts"
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert timeless(Record.load(tmp_path / "whole")) == timeless(Record.load(tmp_path / "parts"))
    assert sorted(os.listdir(tmp_path / "parts")) == FILES
    # There is nothing left to do.
    before = contents(tmp_path / "parts")
    assert silent(parts, resume=True) == tmp_path / "parts"
    assert contents(tmp_path / "parts") == before


def test_an_unfinished_run_is_not_lost(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    stopped(made, "step 4 of 10: loss")
    place = re.escape(f"output_dir={str(tmp_path / 'run')!r}")
    with pytest.raises(ValueError, match=f"{place} holds an unfinished run. Ask to resume or to overwrite it."):
        silent(made)
    with pytest.raises(ValueError, match=f"{place} can be resumed or overwritten, not both."):
        silent(made, resume=True, overwrite=True)
    with pytest.raises(ValueError, match=f"in {place} was begun with another recipe: max_length, training changed."):
        silent(replace(made, max_length=9, training={"max_steps": 3}), resume=True)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
    stopped(made, "step 1 of 10: loss", overwrite=True)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["recipe.yaml"]


def test_a_finished_run_stays_until_another_one_is(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=2))
    folder = silent(replace(made, training={"max_steps": 1}))
    (folder / "mine.txt").write_text("mine")
    (folder / "README.md").write_text("My own words.\n")
    before = contents(folder)
    with pytest.raises(ValueError, match=re.escape(f"{str(folder)!r} holds a finished run. Name another folder")):
        silent(made)
    assert contents(folder) == before
    stopped(made, "step 2 of 2: loss", overwrite=True)
    assert {name: data for name, data in contents(folder).items() if "checkpoints" not in name} == before
    silent(made, overwrite=True)
    after = contents(folder)
    assert sorted(after) == sorted([*FILES, "mine.txt"])
    assert Record.load(folder).training["steps"] == 2
    assert after[WEIGHTS] != before[WEIGHTS]
    assert after["mine.txt"] == b"mine"
    assert b"My own words." in after["README.md"]


@pytest.mark.parametrize(("kind", "message"), [("file", "is a file. Name a folder."), ("folder", "holds no run, but")])
def test_what_others_wrote_is_never_touched(tmp_path: Path, kind: str, message: str) -> None:
    made = recipe(tmp_path)
    place = tmp_path / "run"
    if kind == "folder":
        place.mkdir()
    (place if kind == "file" else place / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=re.escape(f"output_dir={str(place)!r} {message}")):
            silent(made, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_wrong_data_leave_no_folder(tmp_path: Path, split: str) -> None:
    made = recipe(tmp_path)
    made = replace(made, tasks={"mail": replace(made.tasks["mail"], labels=("mail", "junk"))})
    write_rows(tmp_path / "data" / "mail" / f"{split}.jsonl", [{"text": "a", "label": "letter"}])
    message = rf"Task 'mail', .*{split}\.jsonl, row 1 has 'letter' in column 'label', which is none of the task's"
    with pytest.raises(ValueError, match=message):
        silent(made)
    assert not (tmp_path / "run").exists()


def test_a_training_that_cannot_start_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, **training(max_steps=1))
    (tmp_path / "run" / ".unfinished-abc" / "new").mkdir(parents=True)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(runs_training, "begin", fail)
        with pytest.raises(OSError, match="disk full"):
            silent(made)
    assert Record.load(silent(made)).training["steps"] == 1


def test_an_evaluation_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(recipe(tmp_path), output_dir=str(tmp_path / "whole"))
    silent(whole)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runs_training, "evaluate_rows", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            silent(recipe(tmp_path))
    folder = tmp_path / "run"
    assert not Record.load(folder).results
    assert (folder / "checkpoints" / "checkpoint-10").is_dir()
    weights = (folder / WEIGHTS).read_bytes()
    # With fewer rows at once, say.
    silent(recipe(tmp_path, **training(max_steps=10, per_device_eval_batch_size=1)), resume=True)
    assert sorted(os.listdir(folder)) == FILES
    assert (folder / WEIGHTS).read_bytes() == weights == (tmp_path / "whole" / WEIGHTS).read_bytes()
    found, expected = (Record.load(one).results for one in (folder, tmp_path / "whole"))
    assert found["split"] == "test"
    for name, scores in expected["tasks"].items():
        assert found["tasks"][name] == pytest.approx(scores, abs=FLOAT32_FORWARD)


def test_what_only_the_evaluation_reads_may_change_before_a_run_goes_on(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    stopped(made, "step 4 of 10: loss")
    tasks = {name: replace(task, test=None) for name, task in made.tasks.items()}
    options = {**made.training, "per_device_eval_batch_size": 3}
    changed = replace(made, tasks=tasks, training=options, card={"title": "New"}, max_rows={"test": 3})
    with pytest.raises(ValueError, match="was begun with another recipe: tasks changed"):
        silent(replace(changed, tasks={"mail": tasks["mail"]}), resume=True)
    folder = silent(changed, resume=True)
    assert Record.load(folder).results["split"] == "validation"
    assert "New" in (folder / "README.md").read_text()


def test_a_training_that_diverged_keeps_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, **training(max_steps=2, eval_strategy="no"))

    def fail(*_: object) -> None:
        raise ValueError("The update is not finite: training has diverged.")

    with monkeypatch.context() as patch:
        patch.setattr(runs_training, "measure", fail)
        with pytest.raises(ValueError, match="training has diverged"):
            silent(made)
    assert os.listdir(tmp_path / "run") == ["checkpoints"]
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
    assert sorted(os.listdir(silent(made, resume=True))) == FILES


def test_the_trainer_gets_its_section(tmp_path: Path) -> None:
    made = recipe(tmp_path, trainer={"temperature": 50.0, "log_positions": True, "log_task_losses": False})
    history = Record.load(silent(made)).log_history
    assert any(name.startswith("update_norm/") for entry in history for name in entry)
    assert not any("loss_mail" in entry for entry in history)


def test_checkpoints_are_kept_if_the_recipe_says_how_many(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=4, save_total_limit=1, eval_strategy="no"))
    folder = silent(made)
    assert sorted(os.listdir(folder / "checkpoints")) == ["checkpoint-4", "recipe.yaml"]


def test_without_a_test_split_the_next_best_is_evaluated(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=1))
    names = {"validation": ("test",), "train": ("test", "validation")}
    for split, lacking in names.items():
        tasks = {name: replace(task, **dict.fromkeys(lacking)) for name, task in made.tasks.items()}
        folder = silent(replace(made, tasks=tasks), overwrite=True)
        assert Record.load(folder).results["split"] == split


def test_nothing_is_printed_without_a_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = recipe(tmp_path, **training(max_steps=1))
    capfd.readouterr()
    silent(made)
    assert capfd.readouterr() == ("", "")
    train(made, overwrite=True, figures=False)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "step 1 of 1: loss" in printed.err


def test_a_training_tells_which_tasks_are_at_their_most_frequent_answer(tmp_path: Path) -> None:
    lines: list[str] = []
    run = train(recipe(tmp_path, **training(max_steps=1, learning_rate=0.0)), report=lines.append, figures=False)
    weak = run.record.results["no_better_than_majority"]
    for name, values in run.record.results["tasks"].items():
        assert (name in weak) == (values["accuracy"] <= values["majority"])
    told = [
        re.match(r"(\w+): an accuracy of [\d.]+ is no better than always giving its most frequent", one)
        for one in lines
    ]
    assert [match[1] for match in told if match] == weak != []


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: training: Recipes are trained in one process"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="Recipes are trained in one process"):
        silent(made)
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_another_size_is_replaced(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=1))
    run = load_run(silent(made))
    assert run.model.config.num_labels == 4
    assert run.model.config.id2label == {0: "negative", 1: "positive", 2: "mail", 3: "junk"}
