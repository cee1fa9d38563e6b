"""Tasks that are added to a trained run: by examples or a description, with labels that the classifier knows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hyperadapt import LoraGenerator
from hyperadapt.runs import Run, add_task, evaluate, load_run, lora_from_examples, new_task, save_run, train
from hyperadapt.tasks import encoders
from tests.support.helpers import letters
from tests.support.tiny_runs import ADAPTER, labelled_rows, recipe, write_rows

LABELS = {"a": "positive", "b": "negative"}


@pytest.fixture(scope="module", params=["SEQ_CLS", "CAUSAL_LM"])
def task_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(task_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(task_type)
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"}
    train(recipe(folder, task_type, training=training), report=None, figures=False)
    write_rows(folder / "new" / "examples.jsonl", rows(task_type, 12, 1))
    write_rows(folder / "new" / "test.jsonl", rows(task_type, 20, 2))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path / "copy")
    return load_run(tmp_path / "copy" / "run")


def rows(task_type: str, count: int, seed: int) -> list[dict[str, str]]:
    found = labelled_rows(count, seed, LABELS)
    if task_type == "SEQ_CLS":
        return found
    return [{"prompt": row["text"], "completion": row["label"][:1]} for row in found]


def state(run: Run) -> tuple[Any, ...]:
    """What a refused task must leave as it is."""
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    return run.recipe, run.model.peft_config["default"].task_names, weights


def is_unchanged(run: Run, before: tuple[Any, ...]) -> bool:
    *facts, weights = state(run)
    return facts == list(before[:-1]) and all(torch.equal(value, before[-1][name]) for name, value in weights.items())


def test_a_task_is_added_from_files(run: Run, task_type: str) -> None:
    before = evaluate(run)
    files = {name: run.folder.parent / "new" / f"{name}.jsonl" for name in ("examples", "test")}
    add_task(run, "new", description="Tell a from b.", **files)
    task = run.recipe.tasks["new"]
    assert (task.train, task.test) == (str(files["examples"]), str(files["test"]))
    assert task.description == "Tell a from b."
    assert set(task.labels or ()) == (set(LABELS.values()) if task_type == "SEQ_CLS" else set())
    named = run.model.peft_config["default"].labels_of("new")
    assert named == ({0: "negative", 1: "positive"} if task_type == "SEQ_CLS" else {})
    assert run.recipe.adapter_config.task_names == ["reviews", "letters", "mail", "new"]
    after = evaluate(run)
    new = after["tasks"].pop("new")
    assert new["rows"] == 20
    assert after["tasks"] == before["tasks"]
    save_run(run, run.folder)
    loaded = load_run(run.folder)
    assert loaded.recipe == run.recipe
    assert evaluate(loaded, tasks=["new"])["tasks"]["new"] == new


def test_a_data_set_and_several_descriptions(run: Run, task_type: str) -> None:
    add_task(run, "new", description=["Tell a from b.", "Is it a?"], examples=Dataset.from_list(rows(task_type, 8, 1)))
    task = run.recipe.tasks["new"]
    assert (task.description, task.train, task.test) == (("Tell a from b.", "Is it a?"), None, None)
    save_run(run, run.folder)
    assert load_run(run.folder).recipe == run.recipe


def test_of_many_examples_some_are_drawn(run: Run, task_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_task, "MAX_EXAMPLES", 8)
    given = []
    tuner = type(run.model.base_model)
    add = tuner.add_task

    def counted(self: Any, name: str, **options: Any) -> None:
        given.append(len(options["examples"]))
        add(self, name, **options)

    monkeypatch.setattr(tuner, "add_task", counted)
    added = add_task(run, "new", examples=Dataset.from_list(rows(task_type, 30, 1)))
    assert given == [8]
    assert added.examples is not None
    assert added.examples["rows"] == 8


def test_labels_must_be_known(run: Run, task_type: str) -> None:
    if task_type == "CAUSAL_LM":
        pytest.skip("a language model has no labels")
    before = state(run)
    unknown = Dataset.from_list([{"text": "a", "label": "positive"}, {"text": "b", "label": "neutral"}])
    message = (
        "Task 'new' has the labels ['neutral'], for which the classifier has no output: those of a trained adapter"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        add_task(run, "new", examples=unknown)
    with pytest.raises(
        ValueError, match=re.escape("has 'neutral' in column 'label', which is none of the task's labels")
    ):
        add_task(run, "new", examples=unknown, labels=["positive", "negative"])
    with pytest.raises(ValueError, match=re.escape("Task 'new' needs labels=, the names that its rows may get.")):
        add_task(run, "new", description="Tell a from b.")
    assert is_unchanged(run, before)


def test_what_is_wrong_changes_nothing(run: Run, task_type: str) -> None:
    before = state(run)
    labels = ["positive"] if task_type == "SEQ_CLS" else None
    examples = Dataset.from_list(rows(task_type, 8, 1))
    for options, message in (
        ({"name": "mail", "examples": examples}, "There already is a task 'mail'."),
        ({"name": "new", "labels": labels}, "add_task('new') got nothing to go by."),
        ({"name": "new", "labels": labels, "description": "Tell a."}, "This adapter has no task with a description"),
        ({"name": "new", "examples": examples.select([])}, "Task 'new', examples has no rows."),
        ({"name": "new", "examples": "none.jsonl"}, "examples='none.jsonl' is no file: there is none at "),
        ({"name": "new", "examples": "none.txt"}, "examples='none.txt' has an unknown ending."),
        ({"name": "new", "examples": examples, "test": "none.csv"}, "test='none.csv' is no file"),
        ({"name": "mean", "examples": examples}, "A task cannot have the name 'mean'."),
        ({"name": "new", "examples": examples, "labels": ["a", "a"]}, "labels=['a', 'a'] holds a name twice."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            add_task(run, **options)
        assert is_unchanged(run, before)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Encodes descriptions by their letters, whatever encoder is named."""

    def encode_texts(encoder: str, texts: list[str], revision: str | None = None) -> tuple[torch.Tensor, None]:
        return letters(texts), None

    monkeypatch.setattr(encoders, "encode_texts", encode_texts)
    return encode_texts


def test_a_description_alone_is_enough_where_tasks_have_them(tmp_path: Path, encoder: Callable[..., Any]) -> None:
    adapter = {"task_type": "SEQ_CLS", **ADAPTER, "task_embedding": "both", "text_encoder": "base"}
    made = recipe(tmp_path, adapter=adapter, training={"max_steps": 2, "use_cpu": True})
    run = train(made, report=None, figures=False)
    write_rows(tmp_path / "a.jsonl", rows("SEQ_CLS", 5, 1))
    add_task(run, "new", description="Tell a from b.", labels=["negative", "positive"], test=tmp_path / "a.jsonl")
    sources = {"reviews": "both", "letters": "both", "mail": "both", "new": "text"}
    assert run.recipe.adapter_config.task_embedding == sources
    add_task(run, "other", examples=tmp_path / "a.jsonl")
    save_run(run, run.folder)
    loaded = load_run(run.folder)
    assert loaded.recipe == run.recipe
    assert loaded.recipe.adapter_config.task_embedding == sources | {"other": "learned"}
    assert evaluate(loaded, tasks=["new"]) == evaluate(run, tasks=["new"])
    assert loaded.recipe.tasks["new"].labels == ("negative", "positive")


@pytest.mark.parametrize("kind", ["SEQ_CLS", "CAUSAL_LM"])
def test_examples_are_read_by_a_run_that_was_trained_with_them(tmp_path: Path, kind: str) -> None:
    adapter = {"task_type": kind, **ADAPTER, "task_embedding": "examples"}
    made = recipe(tmp_path, kind, adapter=adapter, training={"max_steps": 2, "use_cpu": True, "eval_strategy": "no"})
    run = train(made, report=None, figures=False)
    before = evaluate(run)
    write_rows(tmp_path / "new.jsonl", rows(kind, 40, 1))
    lora = lora_from_examples(run, tmp_path / "new.jsonl")
    add_task(run, "new", examples=tmp_path / "new.jsonl", test=tmp_path / "new.jsonl")
    expected = LoraGenerator.from_model(run.model).state_dict("new")
    assert all(torch.equal(value, expected[name]) for name, value in lora.state_dict().items())
    add_task(run, "fitted", examples=tmp_path / "new.jsonl", fit=True)
    assert {name: evaluate(run)["tasks"][name] for name in before["tasks"]} == before["tasks"]
    save_run(run, run.folder)
    loaded = load_run(run.folder)
    assert loaded.recipe == run.recipe
    assert evaluate(loaded, tasks=["new"]) == evaluate(run, tasks=["new"])
    if kind == "SEQ_CLS":
        write_rows(tmp_path / "wrong.jsonl", [{"text": "a", "label": "neutral"}, {"text": "b", "label": "positive"}])
        with pytest.raises(ValueError, match=re.escape("has the labels ['neutral'], for which the classifier has no")):
            lora_from_examples(run, tmp_path / "wrong.jsonl")
