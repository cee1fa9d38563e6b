"""Runs from recipe to folder and back: training, resuming, evaluating, loading, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hyperadapt.recipes import RecipeError, load_recipe
from hyperadapt.runs import Record, evaluate, load_model, load_record, load_run, save_record, save_run, train
from hyperadapt.runs import folder as run_folder
from hyperadapt.runs import run as run_module
from tests.support.tiny_runs import FILES, WEIGHTS, contents, recipe, silent, training, write_rows
from tests.support.tolerances import FLOAT32_FORWARD


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Task type -> folder with a recipe and a run, and what was reported."""
    found = {}
    for task_type in ("SEQ_CLS", "CAUSAL_LM"):
        folder, lines = tmp_path_factory.mktemp(task_type), []
        assert train(recipe(folder, task_type), report=lines.append, figures=False).folder == folder / "run"
        found[task_type] = (folder, lines)
    return found


@pytest.fixture
def copied(trained: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a run with what it was made from, and names its folder."""

    def copy(task_type: str) -> Path:
        shutil.copytree(trained[task_type][0], tmp_path / task_type)
        return tmp_path / task_type / "run"

    return copy


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_run_is_whole(trained: dict[str, tuple[Path, list[str]]], task_type: str) -> None:
    folder, lines = trained[task_type]
    files = {*FILES, "chat_template.jinja"} if task_type == "CAUSAL_LM" else set(FILES)
    assert set(os.listdir(folder / "run")) == files
    record = Record.load(folder / "run")
    facts = record.training
    assert (facts["steps"], facts["batch_size"], facts["learning_rate"], facts["seed"]) == (10, 8, 2e-3, 0)
    assert facts["rows"] == {"reviews": 40, "letters": 40, "mail": 40}
    assert 0 < facts["trainable_parameters"] < facts["parameters"]
    assert facts["best_step"] in (2, 4, 6, 8, 10)
    assert facts["chosen_by"] == ("mean_loss" if task_type == "CAUSAL_LM" else "mean_accuracy")
    first = json.loads((folder / "data" / "mail" / "train.jsonl").read_text().splitlines()[0])
    assert record.prompts["mail"] == first["prompt" if task_type == "CAUSAL_LM" else "text"]
    call = "tokenizer" if task_type == "CAUSAL_LM" else "classifier"
    assert f'{call}("{record.prompts["reviews"]}", ' in (folder / "run" / "README.md").read_text()
    assert {"epochs", "hardware", "versions", "date", "seconds"} <= facts.keys()
    assert record.results["split"] == "test"
    for values in record.results["tasks"].values():
        assert values["rows"] == 16
        assert 0 <= values["accuracy"] <= 1 >= values["majority"] >= 0.5
        assert values["loss"] > 0
    for metric in ("accuracy", "loss", "majority"):
        values = [values[metric] for values in record.results["tasks"].values()]
        assert record.results["mean"][metric] == pytest.approx(sum(values) / 3)
    metric = "loss" if task_type == "CAUSAL_LM" else "accuracy"
    validated = [entry["step"] for entry in record.log_history if f"eval_mean_{metric}" in entry]
    assert validated == [2, 4, 6, 8, 10]
    base = f"loading the base model {folder / 'base'}"
    assert lines[:3] == ["reading the data of 3 tasks", base, "training on 120 rows"]
    assert re.fullmatch(r"step 1 of 10: loss \d\S* \(((reviews|letters|mail) \d[^,]*(, )?){2,3}\)", lines[3])
    assert len([line for line in lines if f"validation {metric} " in line]) == 5


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_the_recipe_is_kept_with_all_labels(trained: dict[str, tuple[Path, list[str]]], task_type: str) -> None:
    folder, _ = trained[task_type]
    begun, kept = (load_recipe(path) for path in (folder / "recipe.yaml", folder / "run" / "recipe.yaml"))
    assert kept.labels == (["negative", "positive", "mail", "junk"] if task_type == "SEQ_CLS" else [])
    assert replace(kept, tasks={name: replace(task, labels=None) for name, task in kept.tasks.items()}) == begun


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_loaded_run_gives_the_recorded_results(copied: Callable[[str], Path], task_type: str) -> None:
    run = load_run(copied(task_type))
    assert isinstance(run.model, PeftModel)
    assert not run.model.training
    recorded, again = run.record.results, evaluate(run, "test", batch_size=64)
    assert recorded.keys() == again.keys()
    assert recorded["tasks"].keys() == again["tasks"].keys()
    # On a GPU batches of another size are summed in another order.
    for task, values in recorded["tasks"].items():
        assert again["tasks"][task] == pytest.approx(values, rel=FLOAT32_FORWARD)
    assert again["mean"] == pytest.approx(recorded["mean"], rel=FLOAT32_FORWARD)
    assert evaluate(run, "validation", ["mail"], batch_size=1)["tasks"].keys() == {"mail"}
    # The best of the checkpoints was kept.
    metric = {"SEQ_CLS": "accuracy", "CAUSAL_LM": "loss"}[task_type]
    history = [entry[f"eval_mean_{metric}"] for entry in run.record.log_history if f"eval_mean_{metric}" in entry]
    best = max(history) if metric == "accuracy" else min(history)
    if metric == "accuracy":
        assert evaluate(run, "validation")["mean"]["accuracy"] == pytest.approx(best)
    run.model.save_pretrained(str(run.folder / "again"))
    first, second = (load_file(folder / WEIGHTS) for folder in (run.folder, run.folder / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_private_data_stay_private(tmp_path: Path) -> None:
    rows = [{"text": "secret", "label": label} for label in ("positive", "negative")]
    made = recipe(tmp_path, card={"show_inputs": False}, **training(max_steps=1, eval_strategy="no"))
    write_rows(tmp_path / "data" / "reviews" / "train.jsonl", rows * 4)
    folder = silent(made)
    assert Record.load(folder).prompts == {}
    assert all(b"secret" not in content for content in contents(folder).values())


def test_training_learns_and_rows_compete_within_their_task(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=60, learning_rate=1e-2, eval_strategy="no"))
    run = load_run(silent(made))
    mean = evaluate(run, "train")["mean"]
    assert mean["accuracy"] > 0.9 > mean["majority"]
    # A class of another task may have the highest logit.
    bias = run.model.base_model.model.classifier.modules_to_save["default"].bias
    with torch.no_grad():
        bias[run.recipe.labels.index("junk")] += 1e3
        bias[run.recipe.labels.index("mail")] += 1e3
    assert evaluate(run, "train")["mean"]["accuracy"] == mean["accuracy"]


def test_a_run_is_loaded_from_the_hub(
    trained: dict[str, tuple[Path, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = trained["SEQ_CLS"][0] / "run", []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(run_folder, "snapshot_download", download)
    run = load_run("me/mine", revision="abc", token="secret")
    assert run.folder == folder
    assert load_record("me/mine") == run.record
    options = {"ignore_patterns": ["checkpoints/*"]}
    assert asked == [
        ("me/mine", {"revision": "abc", "token": "secret", **options}),
        ("me/mine", {"revision": None, "token": None, **options}),
    ]


def test_a_folder_that_is_no_run_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("SEQ_CLS")
    base = folder.parent / "base"
    base.rename(folder.parent / "moved")
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:1: base_model='../base' is neither a folder \(.*base\) nor a name"
    ):
        load_run(folder)
    (folder.parent / "moved").rename(base)
    (folder / "record.json").rename(folder / "record")
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no record.json")):
        load_run(folder)
    assert load_record(folder) is None
    (folder / "record").rename(folder / "record.json")
    (folder / "recipe.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml"):
        load_run(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "QUESTION_ANS", "task_labels": None}))
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no recipe.yaml, which would say how to make its")):
        load_model(folder)


def test_an_adapter_that_was_changed_without_its_run_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("SEQ_CLS")
    model = load_run(folder).model
    model.rename_task("mail", "post")
    model.save_pretrained(str(folder))
    message = (
        rf"{folder}/recipe.yaml names the tasks \['reviews', 'letters', 'mail'\], and the adapter beside it has "
        r"\['reviews', 'letters', 'post'\], in this order.* Edit the file to match."
    )
    with pytest.raises(ValueError, match=message):
        load_run(folder)
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("mail:", "post:"))
    assert list(evaluate(load_run(folder))["tasks"]) == ["reviews", "letters", "post"]


def test_answers_never_replace_rows(copied: Callable[[str], Path], tmp_path: Path) -> None:
    run = load_run(copied("SEQ_CLS"))
    for split in ("train", "test"):
        rows = Path(getattr(run.recipe.tasks["mail"], split))
        before = rows.read_bytes()
        with pytest.raises(ValueError, match=r"jsonl' holds rows of the run, which would be lost\. Name another file"):
            evaluate(run, tasks=["mail"], predictions=os.path.relpath(rows))
        assert rows.read_bytes() == before
    with pytest.raises(ValueError, match=r"answers\.json' gets a JSON object in each line, but does not end in .jsonl"):
        evaluate(run, tasks=["mail"], predictions=tmp_path / "answers.json")


def test_a_task_that_is_named_twice_is_measured_once(copied: Callable[[str], Path], tmp_path: Path) -> None:
    run = load_run(copied("SEQ_CLS"))
    results = evaluate(run, tasks=["mail", "mail"], predictions=tmp_path / "answers.jsonl")
    assert results["tasks"]["mail"]["rows"] == 16 == len((tmp_path / "answers.jsonl").read_text().splitlines())


LABELS = {
    "SEQ_CLS": {
        "reviews": {0: "negative", 1: "positive"},
        "letters": {0: "negative", 1: "positive"},
        "mail": {2: "mail", 3: "junk"},
    },
    "CAUSAL_LM": None,
}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_model_is_loaded_with_and_without_a_recipe(copied: Callable[[str], Path], task_type: str) -> None:
    folder = copied(task_type)
    for _ in range(2):
        model = load_model(folder)
        config = model.peft_config["default"]
        assert config.task_names == ["reviews", "letters", "mail"]
        assert config.task_labels == LABELS[task_type]
        assert not model.training
        (folder / "recipe.yaml").unlink(missing_ok=True)


def test_a_run_that_was_saved_without_labels_has_those_of_its_recipe(copied: Callable[[str], Path]) -> None:
    folder = copied("SEQ_CLS")
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["task_labels"]
    path.write_text(json.dumps(fields))
    assert load_run(folder).model.peft_config["default"].task_labels == LABELS["SEQ_CLS"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["mail", "none"]},
            r"tasks names \['none'\], which are no tasks of the run. Its tasks: \['reviews', 'l",
        ),
        ({"split": "dev"}, "split='dev' is unknown. Choose one of 'train', 'validation', 'test'."),
        ({"split": "text"}, "split='text' is unknown."),
    ],
)
def test_evaluation_of_what_is_not_there(copied: Callable[[str], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(load_run(copied("SEQ_CLS")), **options)


def test_a_split_that_some_tasks_lack(copied: Callable[[str], Path]) -> None:
    run = load_run(copied("SEQ_CLS"))
    tasks = {name: replace(task, test=None) if name != "mail" else task for name, task in run.recipe.tasks.items()}
    run.recipe = replace(run.recipe, tasks=tasks)
    assert list(evaluate(run)["tasks"]) == ["mail"]
    message = r"The tasks \['letters'\] have no rows for split='test'. Name a file with such rows in recipe.yaml"
    with pytest.raises(ValueError, match=message):
        evaluate(run, tasks=["mail", "letters"])
    run.recipe = replace(run.recipe, tasks={"letters": tasks["letters"]})
    with pytest.raises(ValueError, match=message):
        evaluate(run)


def test_code_that_comes_with_a_model_is_never_run(copied: Callable[[str], Path]) -> None:
    folder = copied("SEQ_CLS")
    base = folder.parent / "base"
    config = json.loads((base / "config.json").read_text())
    classes = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    config |= {"model_type": "mine", "auto_map": dict.fromkeys(classes, "mine.Mine")}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_run(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        silent(load_recipe(folder.parent / "recipe.yaml", output_dir=folder.parent / "other"))


def test_results_go_into_the_record_by_split(copied: Callable[[str], Path]) -> None:
    run = load_run(copied("SEQ_CLS"))
    tested = run.record.results
    validated = evaluate(run, "validation")
    changed = save_record(run, validated)
    assert run.record.other_results == {}
    assert changed.record == Record.load(run.folder) == replace(run.record, other_results={"validation": validated})
    # What tells most comes first, whatever was recorded before.
    untested = replace(run, record=replace(run.record, results={}))
    for split in ("train", "validation", "test"):
        untested = save_record(untested, {**tested, "split": split})
        assert untested.record.results["split"] == split
    assert {name: one["split"] for name, one in untested.record.other_results.items()} == {
        "train": "train",
        "validation": "validation",
    }


def test_part_of_the_results_never_replaces_all(copied: Callable[[str], Path]) -> None:
    run = load_run(copied("SEQ_CLS"))
    before = Record.load(run.folder)
    message = r"The results of the test split lack the tasks \['reviews', 'letters'\], so they cannot take the place of"
    with pytest.raises(ValueError, match=message):
        save_record(run, evaluate(run, "test", ["mail"]))
    with pytest.raises(ValueError, match=r"The results of the test split lack rows beyond limit=4, so they cannot"):
        save_record(run, evaluate(run, "test", limit=4))
    assert Record.load(run.folder) == before


def test_a_failing_save_changes_nothing(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(copied("SEQ_CLS"))
    before = contents(run.folder)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    run.model.base_model.rename_task("mail", "post")
    monkeypatch.setattr(Record, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_run(run, run.folder)
    assert contents(run.folder) == before


def test_a_card_that_cannot_be_made_costs_no_training(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(copied("SEQ_CLS"))

    def fail(*_: object, **__: object) -> str:
        raise OSError("no font")

    monkeypatch.setattr(run_module, "write_report", fail)
    with pytest.raises(OSError, match="no font"):
        save_run(run, tmp_path / "other")
    monkeypatch.undo()
    loaded = load_run(tmp_path / "other")
    assert (loaded.recipe.tasks, loaded.record) == (run.recipe.tasks, run.record)
    saved, known = (load_file(folder / WEIGHTS) for folder in (loaded.folder, run.folder))
    assert saved.keys() == known.keys()
    assert all(torch.equal(value, known[name]) for name, value in saved.items())
    # Nor does a run without results, whose card says nothing of them.
    save_run(replace(run, record=replace(run.record, results={})), tmp_path / "third")
    assert (tmp_path / "third" / "README.md").exists()


def test_a_card_names_the_folder(copied: Callable[[str], Path], tmp_path: Path) -> None:
    run = load_run(copied("CAUSAL_LM"))
    for folder in (run.folder, tmp_path / "other"):
        save_run(run, folder)
        assert f'from_pretrained(base_model, "{folder}")' in (folder / "README.md").read_text()
        assert "unfinished" not in (folder / "README.md").read_text()
    # Elsewhere the model still writes its own card.
    run.model.save_pretrained(str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "README.md").exists()
