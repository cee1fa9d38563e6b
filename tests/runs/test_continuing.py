"""A trained run that learns new tasks from a file: what the known tasks keep, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperadapt.recipes import load_additions
from hyperadapt.runs import Run, continue_run, load_run, save_run, train
from tests.support.helpers import trainable
from tests.support.tiny_runs import labelled_rows, recipe, tokenizer, training, write_rows

LABELS = {"a": "positive", "b": "negative"}
OTHERS = {"c": "junk", "d": "mail"}


@pytest.fixture(scope="module", params=["SEQ_CLS", "CAUSAL_LM"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and the rows of two new tasks."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = training(max_steps=30, learning_rate=1e-2, eval_strategy="no")
    train(recipe(folder, request.param, **changes), report=None, figures=False)
    for name, labels in (("first", LABELS), ("second", OTHERS)):
        rows = labelled_rows(24, 1, labels)
        if request.param == "CAUSAL_LM":
            words = {"positive": "yes", "negative": "no", "junk": "spam", "mail": "ham"}
            rows = [{"prompt": row["text"], "completion": words[row["label"]]} for row in rows]
        write_rows(folder / "new" / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path / "copy")
    return load_run(tmp_path / "copy" / "run")


def file(run: Run, options: str, tasks: tuple[str, ...] = ("first", "second")) -> Path:
    path = run.folder.parent / "more.yaml"
    sections = "".join(f"  {name}: {{train: new/{name}.jsonl, test: new/{name}.jsonl}}\n" for name in tasks)
    path.write_text(f"{options}tasks:\n{sections}", encoding="utf-8")
    return path


@torch.no_grad()
def answers(run: Run) -> dict[str, torch.Tensor]:
    """The logits of each known task, in one batch of all tasks and alone."""
    known = ["reviews", "letters", "mail"]
    made = tokenizer(run.recipe.task_type)
    batch = made(["good a b", "yes c d", "spam e f"], return_tensors="pt")
    found = {"mixed": run.model(**batch, tasks=known).logits}
    return found | {name: run.model(**batch, tasks=name).logits for name in known}


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_known_tasks_are_held_bit_by_bit(run: Run) -> None:
    before = answers(run)
    weights = {name: value.clone() for name, value in run.model.state_dict().items() if "task_embedding" not in name}
    flags, results, lines = trainable(run.model), run.record.results, []
    additions = load_additions(file(run, "keep: exact\nsteps: 12\nlearning_rate: 5e-3\n"), run.recipe)
    added = continue_run(run, additions, report=lines.append)
    assert [one.name for one in added] == ["first", "second"]
    assert all(one.trained and not one.old_tasks for one in added)
    assert [one.examples and one.examples["rows"] for one in added] == [24, 24]
    assert [line for line in lines if line.startswith(("training on", "no rows"))] == [
        "training on 24 rows of first",
        "training on 24 rows of second",
    ]
    # What was measured of the known tasks holds as well.
    assert run.record.results == results != {}
    facts = {"steps": 12, "learning_rate": 5e-3, "rows": 24, "replayed_rows": 0}
    assert run.record.training["added_tasks"] == {"first": facts, "second": facts}
    assert {name for name in trainable(run.model) if ".own_factors." not in name} == flags
    assert is_same(answers(run), before)
    after = run.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    assert run.recipe.adapter_config.task_names == ["reviews", "letters", "mail", "first", "second"]
    assert run.recipe.tasks["first"].test == str(run.folder.parent / "new" / "first.jsonl")
    assert run.recipe.adapter_config.own_factors == ["first", "second"]
    assert all(one.any() for name, one in run.model.named_parameters() if ".own_factors." in name)
    # The new tasks do learn.
    batch = tokenizer(run.recipe.task_type)(["good a b"], return_tensors="pt")
    with torch.no_grad():
        logits = {name: run.model(**batch, tasks=name).logits for name in run.recipe.tasks}
    assert not any(torch.equal(logits["first"], logits[name]) for name in ("reviews", "letters", "mail", "second"))
    save_run(run, run.folder)
    loaded = load_run(run.folder)
    assert is_same(answers(loaded), before)
    assert loaded.recipe == run.recipe


def test_known_tasks_are_replayed(run: Run) -> None:
    before, lines = answers(run), []
    options = "steps: 12\nlearning_rate: 5e-3\nreplay: {mail: data/mail/validation.jsonl}\n"
    path = file(run, options)
    added = continue_run(run, load_additions(path, run.recipe), report=lines.append)
    # The first new task is one of the known ones when the second comes.
    assert [list(one.old_tasks) for one in added] == [
        ["reviews", "letters", "mail"],
        ["reviews", "letters", "mail", "first"],
    ]
    assert [line for line in lines if line.startswith("training on")] == [
        "training on 24 rows of first and 92 of 3 old tasks",
        "training on 24 rows of second and 116 of 4 old tasks",
    ]
    assert {one.old_tasks["mail"]["split"] for one in added} == {"replay"}
    facts = run.record.training["added_tasks"]
    assert facts["second"] == {"steps": 12, "learning_rate": 5e-3, "rows": 24, "replayed_rows": 116}
    assert not is_same(answers(run), before)
    save_run(run, run.folder)
    assert load_run(run.folder).record == run.record


def test_all_data_are_read_before_anything_changes(run: Run) -> None:
    before, tasks = answers(run), run.recipe.tasks
    rows = run.folder.parent / "new" / "second.jsonl"
    wrong: list[dict[str, Any]] = [{"text": "a", "label": "neutral"}]
    message = "Task 'second' has the labels ['neutral'], for which the classifier has no output"
    if run.recipe.task_type == "CAUSAL_LM":
        wrong, message = [{"prompt": "a", "completion": ""}], "row 1 has an empty prompt or completion."
    write_rows(rows, wrong)
    for keep in ("exact", "replay"):
        with pytest.raises(ValueError, match=re.escape(message)):
            continue_run(run, load_additions(file(run, f"keep: {keep}\n"), run.recipe), report=None)
        assert run.recipe.tasks == tasks
        assert is_same(answers(run), before)
