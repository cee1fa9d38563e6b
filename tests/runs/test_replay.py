"""A new task that is trained with rows of the old ones: what it learns, what they keep, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hyperadapt.runs import AddedTask, Record, Run, add_task, evaluate, load_run, replay, save_run, train
from hyperadapt.runs.replay import train_with_replay, trainable
from hyperadapt.tasks import encoders
from tests.support.helpers import letters
from tests.support.tiny_runs import ADAPTER, contents, labelled_rows, recipe, silent, training, write_rows
from tests.support.tolerances import FLOAT32_FORWARD

LABELS = {"a": "positive", "b": "negative"}
OLD = {"reviews": ("good", "bad"), "letters": ("yes", "no"), "mail": ("spam", "ham")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains tiny runs, each once, and names the folder with run and data."""
    folders: dict[str, Path] = {}

    def folder(task_type: str) -> Path:
        if task_type not in folders:
            folders[task_type] = tmp_path_factory.mktemp(task_type)
            # What is for this training alone would spoil the next one.
            training = {
                "max_steps": 40,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "eval_strategy": "steps",
                "eval_steps": 30,
                "warmup_steps": 10,
                "logging_steps": 1000,
            }
            changes = {"training": training, "trainer": {"temperature": 50.0}}
            train(recipe(folders[task_type], task_type, **changes), report=None, figures=False)
        return folders[task_type]

    return folder


@pytest.fixture
def copied(trained: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Run]:
    def load(task_type: str) -> Run:
        shutil.copytree(trained(task_type), tmp_path / "copy")
        return load_run(tmp_path / "copy" / "run")

    return load


@pytest.fixture
def run(copied: Callable[[str], Run]) -> Run:
    return copied("SEQ_CLS")


def rows(count: int, seed: int = 1, task_type: str = "SEQ_CLS") -> Dataset:
    found = labelled_rows(count, seed, LABELS)
    if task_type == "CAUSAL_LM":
        answers = {"positive": "yes", "negative": "no"}
        found = [{"prompt": row["text"], "completion": answers[row["label"]]} for row in found]
    return Dataset.from_list(found)


def state(run: Run) -> tuple[Any, ...]:
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    return run.recipe, run.record, run.model.peft_config["default"].task_names, flags, weights


def is_unchanged(run: Run, before: tuple[Any, ...]) -> bool:
    *facts, weights = state(run)
    same = facts == list(before[:-1])
    return same and all(torch.equal(value, before[-1][name]) for name, value in weights.items())


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_task_is_trained_and_the_old_ones_are_kept(copied: Callable[[str], Run], task_type: str) -> None:
    run, lines = copied(task_type), []
    before = evaluate(run)["tasks"]
    run.record = replace(run.record, other_results={"validation": {"split": "validation", "tasks": before}})
    added = add_task(run, "new", examples=rows(30, 1, task_type), train=True, steps=60, report=lines.append)
    assert isinstance(added, AddedTask)
    assert added.examples is not None
    assert added.examples["rows"] == 30
    assert added.examples["accuracy"] > 0.9 > added.examples["majority"]
    assert not added.no_better_than_majority
    after = evaluate(run)["tasks"]
    assert added.old_tasks == {
        name: {"before": before[name]["accuracy"], "after": after[name]["accuracy"], "rows": 16, "split": "test"}
        for name in OLD
    }
    gains = [values["after"] - values["before"] for values in added.old_tasks.values()]
    assert sum(gains) / 3 > -0.05
    # All of the adapter was trained.
    assert after != before
    assert lines[0] == "training on 30 rows of new and 120 of 3 old tasks"
    assert [line.split(":")[0] for line in lines[1:]] == [f"step {step} of 60" for step in range(6, 61, 6)]
    text = str(added).splitlines()
    assert re.fullmatch(r"new, on its own 30 examples: accuracy [01]\.\d{3}, most frequent answer .*", text[0])
    assert re.fullmatch(r"old tasks, mean accuracy: [01]\.\d{3} before, [01]\.\d{3} after", text[1])
    assert re.fullmatch(r"  reviews: [01]\.\d{3} before, [01]\.\d{3} after \(test, 16 rows\)", text[2])
    # What was measured of the adapter before is not told of this one.
    assert (run.record.results, run.record.other_results) == ({}, {})
    facts = run.record.training["added_tasks"]["new"]
    assert facts == {"steps": 60, "learning_rate": 1e-2, "rows": 30, "replayed_rows": 120}
    save_run(run, run.folder)
    loaded = load_run(run.folder)
    assert loaded.record == run.record
    for name, values in evaluate(loaded)["tasks"].items():
        assert values == pytest.approx(after[name], rel=FLOAT32_FORWARD)
    assert not any(parameter.requires_grad for parameter in run.model.parameters())


def test_without_replay_the_old_tasks_are_forgotten(run: Run) -> None:
    """That the rows of old tasks do what they are there for."""
    before = sum(values["accuracy"] for values in evaluate(run)["tasks"].values()) / 3
    own = Dataset.from_list(labelled_rows(30, 1, {"good": "negative", "bad": "positive", "a": "positive"}))
    losses = {}
    for is_replayed in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not is_replayed:
                patch.setattr(replay, "_halves", lambda name, new, old: {name: new})
            copy = load_run(run.folder)
            added = add_task(copy, "new", examples=own, train=True, steps=40, report=None)
        losses[is_replayed] = before - sum(values["after"] for values in added.old_tasks.values()) / 3
    assert losses[True] < 0.1 < losses[False]


def test_a_task_gets_half_of_the_rows() -> None:
    def counts(new: int, **old: int) -> dict[str, int]:
        made = {name: Dataset.from_dict({"row": list(range(count))}) for name, count in {"new": new, **old}.items()}
        found = replay._halves("new", made.pop("new"), made)
        for name, data in found.items():
            times = {data["row"][:].count(row) for row in set(data["row"])}
            assert len(times) == 1 or max(times) - min(times) == 1, name
        return {name: len(data) for name, data in found.items()}

    assert counts(8, one=30, two=10) == {"one": 30, "two": 10, "new": 40}
    assert counts(100, one=30, two=10) == {"one": 75, "two": 25, "new": 100}
    assert counts(5, one=5) == {"one": 5, "new": 5}


def test_rows_are_given_where_the_recipes_are_gone(run: Run, tmp_path: Path) -> None:
    before = state(run)
    path = run.folder.parent / "data" / "mail" / "train.jsonl"
    path.rename(tmp_path / "moved.jsonl")
    message = f"Task 'mail', {path} is not there. Correct the path in the recipe. This is an old task, whose rows"
    with pytest.raises(ValueError, match=re.escape(message)):
        add_task(run, "new", examples=rows(12), train=True, report=None)
    assert is_unchanged(run, before)
    given: Mapping[str, Any] = {
        "mail": tmp_path / "moved.jsonl",
        "letters": Dataset.from_list(labelled_rows(20, 3, {"yes": "positive", "no": "negative"})),
    }
    lines: list[str] = []
    added = add_task(run, "new", examples=rows(12), train=True, steps=2, replay=given, report=lines.append)
    assert lines[0] == "training on 12 rows of new and 100 of 3 old tasks"
    assert {name: (values["split"], values["rows"]) for name, values in added.old_tasks.items()} == {
        "reviews": ("test", 16),
        "letters": ("replay", 20),
        "mail": ("replay", 40),
    }


def test_old_tasks_without_rows_are_told(run: Run) -> None:
    tasks = {name: replace(task, train=None, validation=None) for name, task in run.recipe.tasks.items()}
    run.recipe = replace(run.recipe, tasks={**tasks, "mail": run.recipe.tasks["mail"]})
    lines: list[str] = []
    added = add_task(run, "new", examples=rows(12), train=True, steps=1, report=lines.append)
    assert lines[:2] == ["no rows to train on again: reviews, letters", lines[1]]
    assert added.old_tasks.keys() == OLD.keys()
    run = load_run(run.folder)
    run.recipe = replace(run.recipe, tasks=tasks)
    before = state(run)
    with pytest.raises(ValueError, match=re.escape("None of the old tasks ['reviews', 'letters', 'mail'] has rows")):
        add_task(run, "new", examples=rows(12), train=True, report=None)
    assert is_unchanged(run, before)


def test_what_is_wrong_changes_nothing(run: Run) -> None:
    before, examples = state(run), rows(12)
    for options, error, message in (
        ({"train": True, "description": "Tell a."}, ValueError, "train needs examples to train on."),
        ({"examples": examples, "steps": 5}, ValueError, "steps: this is for a training, and train is not set."),
        (
            {"examples": examples, "replay": {}, "learning_rate": 1e-3},
            ValueError,
            "replay, learning_rate: this is for a training, and train is not set.",
        ),
        ({"examples": examples, "train": True, "steps": 0}, ValueError, "steps=0 must be at least 1."),
        ({"examples": examples, "train": True, "steps": 1.5}, TypeError, "steps=1.5 must be an integer"),
        ({"examples": examples, "train": True, "learning_rate": -1.0}, ValueError, "learning_rate=-1.0 must be"),
        (
            {"examples": examples, "train": True, "replay": {"post": examples}},
            ValueError,
            "replay names ['post'], which are no old tasks of the adapter. Its tasks: ['reviews', 'letters', 'mail'].",
        ),
        (
            {"examples": examples, "train": True, "replay": {"mail": "none.jsonl"}},
            ValueError,
            "replay['mail']='none.jsonl' is no file: there is none at ",
        ),
        (
            {"examples": examples, "train": True, "replay": {"mail": examples}},
            ValueError,
            "in column 'label', which is none of the task's labels: ['mail', 'junk'].",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            add_task(run, "new", **options)
        assert is_unchanged(run, before)


def test_a_task_that_answers_nothing_right_is_not_added(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = state(run), contents(run.folder)
    told = AddedTask("new", {"accuracy": 0.0, "loss": 2.0, "rows": 12, "majority": 0.5}, True)
    monkeypatch.setattr("hyperadapt.runs.new_task._told", lambda *_: told)
    message = (
        "After 3 steps at a rate of 0.01, task 'new' answers none of its 12 examples right, so it was not added. Train "
        "longer (steps), at another learning_rate, or check the examples."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        add_task(run, "new", examples=rows(12), train=True, steps=3, report=None)
    assert is_unchanged(run, before)
    assert contents(run.folder) == files


def test_an_interrupted_training_changes_nothing(run: Run) -> None:
    before = state(run)

    def interrupt(line: str) -> None:
        if line.startswith("step 6 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_task(run, "new", examples=rows(12), train=True, steps=30, report=interrupt)
    assert is_unchanged(run, before)
    assert not run.model.training


def test_an_interrupted_training_leaves_the_examples_of_old_tasks(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, adapter={**ADAPTER, "task_type": "SEQ_CLS", "task_embedding": "examples"}, **training(max_steps=3)
    )
    run = load_run(silent(made))
    before = state(run)

    def interrupt(line: str) -> None:
        if line.startswith("step 2 "):
            raise KeyboardInterrupt

    # Those that are trained on again are others than the ones that a task was made of.
    again = {"reviews": Dataset.from_list(labelled_rows(12, 9, {"good": "positive", "bad": "negative"}))}
    with pytest.raises(KeyboardInterrupt):
        add_task(run, "new", examples=rows(12), train=True, steps=5, replay=again, report=interrupt)
    assert is_unchanged(run, before)


def test_numbers_come_back_on_an_error(run: Run) -> None:
    before = state(run)
    data = {"reviews": replay.read_replay(run, {}).train["reviews"]}

    def fail() -> None:
        with trainable(run.model):
            train_with_replay(run, "mail", data["reviews"], data, steps=3, learning_rate=None, report=None)
            trained = {name for name, one in run.model.named_parameters() if one.requires_grad}
            changed = {name for name, one in run.model.named_parameters() if not torch.equal(one, before[-1][name])}
            # The hypernetwork and the classifier, and nothing of the base model.
            assert changed <= trained
            assert {name.partition("default")[0].rpartition(".")[0] for name in changed} == {
                "base_model.hyperadapter_networks",
                "base_model.model.classifier.modules_to_save",
            }
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert is_unchanged(run, before)


def test_the_last_word_on_a_task_that_learned_nothing() -> None:
    scores = {"accuracy": 0.5, "loss": 0.7, "rows": 12, "majority": 0.5}
    line = "new: an accuracy of 0.500 is no better than always giving its most frequent answer (0.500): "
    fitted = str(AddedTask("new", scores, True))
    assert fitted.splitlines()[1] == f"{line}train on it, with train=True (--train)"
    old = {"mail": {"before": 0.9, "after": 0.8, "rows": 16, "split": "test"}}
    alone = str(AddedTask("new", scores, True, trained=True))
    assert alone.splitlines()[1:] == [f"{line}train longer, or at another rate"]
    assert str(AddedTask("new", scores, True, old, trained=True)).splitlines()[1:] == [
        f"{line}train longer, or at another rate",
        "old tasks, mean accuracy: 0.900 before, 0.800 after",
        "  mail: 0.900 before, 0.800 after (test, 16 rows)",
    ]
    assert str(AddedTask("new")) == "new: added by its description, and not tried on any row"


def test_a_description_is_what_is_trained_where_the_adapter_reads_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_texts(encoder: str, texts: list[str], revision: str | None = None) -> tuple[torch.Tensor, None]:
        return letters(texts), None

    monkeypatch.setattr(encoders, "encode_texts", encode_texts)
    adapter = {"task_type": "SEQ_CLS", **ADAPTER, "task_embedding": "text", "text_encoder": "base"}
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"}
    run = train(recipe(tmp_path, adapter=adapter, training=training), report=None, figures=False)
    write_rows(tmp_path / "new.jsonl", labelled_rows(12, 1, LABELS))
    for name, description in (("new", "Tell a from b."), ("other", None)):
        add_task(
            run,
            name,
            description=description,
            examples=tmp_path / "new.jsonl",
            train=True,
            steps=2,
            learning_rate=1e-3,
            report=None,
        )
    sources = dict.fromkeys(["reviews", "letters", "mail", "new"], "text") | {"other": "learned"}
    assert run.recipe.adapter_config.task_embedding == sources
    assert run.record.training["added_tasks"]["other"]["replayed_rows"] == 120 + 12
    save_run(run, run.folder)
    assert load_run(run.folder).recipe == run.recipe
    assert Record.load(run.folder).results == {}
