"""Answers to rows: as the evaluation gives them, of mixed tasks, from a recipe or without one; and their measures."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hyperadapt.runs import Run, evaluate, evaluate_predictions, load_run, predict, train
from hyperadapt.runs.run import load_for_prediction
from tests.support.helpers import make_active
from tests.support.tiny_runs import recipe
from tests.support.tolerances import FLOAT32_FORWARD

TASKS = ["reviews", "letters", "mail"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for task_type in ("SEQ_CLS", "CAUSAL_LM"):
        folder = tmp_path_factory.mktemp(task_type)
        training = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"}
        found[task_type] = train(recipe(folder, task_type, training=training), report=None, figures=False).folder
    return found


@pytest.fixture(params=["SEQ_CLS", "CAUSAL_LM"])
def run(folders: dict[str, Path], request: pytest.FixtureRequest) -> Run:
    run = load_run(folders[request.param])
    # So that tasks answer differently.
    make_active(run.model)
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_those_of_an_evaluation(run: Run, tmp_path: Path) -> None:
    results = evaluate(run, "test", predictions=tmp_path / "new" / "out.jsonl")
    written = lines(tmp_path / "new" / "out.jsonl")
    assert [line["task"] for line in written] == [task for task in TASKS for _ in range(16)]
    column = "text" if run.recipe.task_type == "SEQ_CLS" else "prompt"
    files = [
        json.loads(line) for task in TASKS for line in Path(run.recipe.tasks[task].test or "").read_text().splitlines()
    ]
    assert [line[column] for line in written] == [row[column] for row in files]
    rows = [{**row, "task": task} for task, row in zip([line["task"] for line in written], files, strict=True)]
    longest = 2 if run.recipe.task_type == "CAUSAL_LM" else 64
    # One batch of all tasks, as well as row by row.
    for size in (64, 1):
        for given, wanted in zip(predict(run, rows, batch_size=size, max_new_tokens=longest), written, strict=True):
            scores = given.pop("scores", {}), wanted.get("scores", {})
            assert scores[0] == pytest.approx(scores[1], rel=FLOAT32_FORWARD)
            score = given.pop("score", None)
            assert score == (max(scores[0].values()) if scores[0] else None)
            assert given == {name: value for name, value in wanted.items() if not name.startswith("score")}
    measured = evaluate_predictions(tmp_path / "new" / "out.jsonl")
    assert measured["split"] == "predictions"
    for task, values in results["tasks"].items():
        found = measured["tasks"][task]
        assert {**found, "loss": 0} == {**values, "loss": 0}
        if run.recipe.task_type == "SEQ_CLS":
            assert found["loss"] == pytest.approx(values["loss"], rel=1e-5)
        else:
            assert (found["loss"], measured["mean"]["loss"]) == (None, None)
    assert measured["no_better_than_majority"] == results["no_better_than_majority"]


def test_only_a_tasks_own_labels_compete(folders: dict[str, Path]) -> None:
    run = load_run(folders["SEQ_CLS"])
    with torch.no_grad():
        run.model.base_model.model.classifier.modules_to_save["default"].bias[run.recipe.labels.index("junk")] += 50
    found = predict(run, ["good", "spam"], "reviews")
    assert all(set(line["scores"]) == {"negative", "positive"} for line in found)
    assert all(sum(line["scores"].values()) == pytest.approx(1) for line in found)
    assert [line["label"] for line in predict(run, ["good", "spam"], "mail")] == ["junk", "junk"]


def test_an_adapter_without_a_recipe_answers_too(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    run.model.save_pretrained(str(folder))
    bare = load_for_prediction(folder)
    rows = ["good a b", "yes"]
    # Its tokenizer is the base model's.
    assert predict(bare, rows, "letters", max_new_tokens=3) == predict(run, rows, "letters", max_new_tokens=3)
    shutil.copy(run.folder / "tokenizer_config.json", folder)
    shutil.copy(run.folder / "tokenizer.json", folder)
    assert predict(load_for_prediction(folder), rows, "mail", max_new_tokens=3) == predict(
        run, rows, "mail", max_new_tokens=3
    )
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(ValueError, match="is of task_type='TOKEN_CLS', and rows are answered for 'SEQ_CLS'"):
        load_for_prediction(folder)


def test_long_prompts_lose_their_beginning(folders: dict[str, Path]) -> None:
    run = load_run(folders["CAUSAL_LM"])
    prompt = "a b c d e f g h " * 10
    short = predict(run, [" ".join(prompt.split()[-31:])], "mail", max_new_tokens=1)
    assert predict(run, [prompt], "mail", max_new_tokens=1)[0]["completion"] == short[0]["completion"]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_what_has_no_token_is_refused_before_anything_is_answered(folders: dict[str, Path], task_type: str) -> None:
    run = load_run(folders[task_type])
    run.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    with pytest.raises(ValueError, match=r"^Row 2 has a (text|prompt) of which the tokenizer makes no token\."):
        predict(run, ["a", " "], "mail")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size=0 must be"), ({"max_new_tokens": 0}, "max_new_tokens=0 must")],
)
def test_sizes_are_checked(folders: dict[str, Path], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(load_run(folders["SEQ_CLS"]), ["a"], "mail", **options)


def test_a_limit_takes_some_rows_of_each_task(run: Run) -> None:
    results = evaluate(run, "test", limit=5)
    assert results["limit"] == 5
    assert {values["rows"] for values in results["tasks"].values()} == {5}
    assert evaluate(run, "test", limit=5) == results
    assert {values["rows"] for values in evaluate(run, "test", limit=99)["tasks"].values()} == {16}
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        evaluate(run, limit=0)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_give_the_loss(tmp_path: Path) -> None:
    row = {"task": "a", "label": "x", "expected": "x", "scores": {"x": 0.8, "y": 0.2}}
    wrong = {**row, "expected": "y"}
    found = evaluate_predictions(write(tmp_path / "a.jsonl", row, wrong, row))["tasks"]["a"]
    assert found == {
        "accuracy": 2 / 3,
        "loss": pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3),
        "rows": 3,
        "majority": 2 / 3,
    }
    # Something else than a probability tells none.
    for scores in ({"x": 0.8}, {"x": 2, "y": 2}, {"y": True}, [], None):
        path = write(tmp_path / "b.jsonl", row, {**wrong, "scores": scores})
        assert evaluate_predictions(path)["tasks"]["a"]["loss"] is None
    assert evaluate_predictions(write(tmp_path / "c.jsonl", {**wrong, "scores": {"y": 0}}))["mean"]["loss"] == math.inf


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"task": "a", "text": "b"},
            "FILE, row 1 is {'task': 'a', 'text': 'b'}, which is no prediction: it needs the te",
        ),
        ({"label": "a", "expected": "b"}, "FILE, row 1 is {'expected': 'b', 'label': 'a'}, which is no prediction"),
        ({"task": "a", "label": 3}, "FILE, row 1 is {'label': 3, 'task': 'a'}, which is no prediction"),
        (
            {"task": "a", "label": "b"},
            "FILE, row 1 has no 'expected' answer to compare with. Predict rows that have a label, or a completion.",
        ),
        ({"task": "a", "label": "b", "expected": None}, "FILE, row 1 has no 'expected' answer"),
        ([1], "FILE, row 1 is [1], but must be an object"),
    ],
)
def test_what_is_no_prediction_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "out.jsonl", row)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FILE', str(path)))}"):
        evaluate_predictions(path)


def test_files_without_predictions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl' is no file. Name one that predict --output or evaluate --pred"):
        evaluate_predictions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"a.csv' holds no predictions: those are in a .jsonl file"):
        evaluate_predictions(write(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"a.jsonl' has no rows. Predict some."):
        evaluate_predictions(write(tmp_path / "a.jsonl"))
