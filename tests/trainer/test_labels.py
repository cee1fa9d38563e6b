"""Labels of tasks that training data, or the base model, name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from transformers import TrainingArguments

from hyperadapt.trainer import HyperAdapterTrainer
from tests.support.helpers import adapted_model

IDS = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


def rows(labels: list[Any], names: list[str] | None = None) -> Dataset:
    made = Dataset.from_dict({"input_ids": IDS[: len(labels)], "labels": labels})
    return made if names is None else made.cast_column("labels", ClassLabel(names=names))


def labels_after(tmp_path: Path, data: dict[str, Dataset], names: dict[int, str] | None = None, **changes: Any) -> Any:
    model = adapted_model("bert", **{"task_type": "SEQ_CLS", **changes})
    if names:
        model.peft_config["default"].adapted_model["config"]["id2label"] = {str(at): name for at, name in names.items()}
    HyperAdapterTrainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), train_dataset=data)
    return model.peft_config["default"].task_labels


NAMES = {0: "x", 1: "y", 2: "z"}


@pytest.mark.parametrize(
    ("data", "names", "expected"),
    [
        # The classes that a task's rows have are its own.
        (
            {"alpha": rows([2, 0, 2], ["x", "y", "z"]), "beta": rows([1], ["x", "y", "z"])},
            None,
            {"alpha": {0: "x", 2: "z"}, "beta": {1: "y"}},
        ),
        ({"alpha": rows([2, 0]), "gamma": rows([1])}, NAMES, {"alpha": {0: "x", 2: "z"}, "gamma": {1: "y"}}),
        # Nobody has named them.
        ({"alpha": rows([2, 0])}, None, None),
        # Several labels a row are no classes.
        ({"alpha": rows([[0.0, 1.0, 0.0]])}, NAMES, None),
    ],
)
def test_labels_of_training_data(tmp_path: Path, data: Any, names: Any, expected: Any) -> None:
    assert labels_after(tmp_path, data, names) == expected


def test_labels_that_were_given_stay(tmp_path: Path) -> None:
    data = {"alpha": rows([2, 0], ["x", "y", "z"]), "beta": rows([1, 2], ["x", "y", "z"])}
    given = {"beta": {0: "mine"}}
    assert labels_after(tmp_path, data, task_labels=given) == {"alpha": {0: "x", 2: "z"}, **given}


def test_other_models_have_no_labels(tmp_path: Path) -> None:
    assert labels_after(tmp_path, {"alpha": rows([2, 0], ["x", "y", "z"])}, task_type=None) is None
