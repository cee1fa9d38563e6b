"""Labels of tasks: what a configuration takes, and which outputs they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, PeftModel, get_peft_model

from hyperadapt import HyperAdapterConfig
from hyperadapt.config.adapted_fields import AdaptedModel
from hyperadapt.config.label_fields import all_names, own_names
from tests.support.helpers import adapted_model, adapter_config, base_model

NAMES = {"id2label": {"0": "news", "1": "spam", "2": "ham"}}


def model(labels: Any, **changes: Any) -> PeftModel:
    return adapted_model("bert", task_type="SEQ_CLS", task_labels=labels, **changes)


def labels_of(made: PeftModel) -> Any:
    return made.peft_config["default"].task_labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"beta": ["x", "y", "z"]}, {"beta": {0: "x", 1: "y", 2: "z"}}),
        ({"beta": {2: "x", 0: "y"}, "alpha": {"1": "x"}}, {"beta": {0: "y", 2: "x"}, "alpha": {1: "x"}}),
        ({"beta": dict(zip(np.arange(3), "xyz", strict=True))}, {"beta": {0: "x", 1: "y", 2: "z"}}),
        ({}, None),
        (None, None),
    ],
)
def test_labels_become_those_of_outputs(labels: Any, expected: Any, tmp_path: Path) -> None:
    made = model(labels)
    assert labels_of(made) == expected
    made.save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, HyperAdapterConfig)
    assert config.task_labels == expected
    # In order, although JSON holds keys as texts.
    assert all(list(one) == sorted(one) for one in (config.task_labels or {}).values())
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    assert labels_of(loaded) == expected


def test_names_are_found_in_the_base_model() -> None:
    base = base_model("bert")
    base.config.id2label = {0: "news", 1: "spam", 2: "ham"}
    made = get_peft_model(base, adapter_config(task_type="SEQ_CLS", task_labels={"beta": ["ham", "spam"]}))
    assert labels_of(made) == {"beta": {1: "spam", 2: "ham"}}
    message = (
        "Task 'alpha' has the labels ['eggs'], but the classifier's outputs are called ['news', 'spam', 'ham']. Use "
        "those names, or say which output each label is, as in {0: 'eggs'}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        made.set_labels("alpha", ["eggs", "ham"])
    assert labels_of(made) == {"beta": {1: "spam", 2: "ham"}}


def test_ten_outputs_keep_their_order(tmp_path: Path) -> None:
    config = HyperAdapterConfig(tasks=["a"], task_labels={"a": {output: f"l{output}" for output in range(12)}})
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, HyperAdapterConfig)
    assert list(loaded.labels_of("a")) == list(range(12))


BAD: list[tuple[Any, type[Exception], str]] = [
    (["a"], TypeError, "task_labels=['a'] must be a dict from task name to labels, not list."),
    (
        {"delta": ["a"]},
        ValueError,
        "task_labels names 'delta', which is not among the tasks ['alpha', 'beta', 'gamma'].",
    ),
    ({"beta": "spam"}, TypeError, "The labels of task 'beta' are 'spam', of type str. Give a list of names, or a dict"),
    ({"beta": []}, ValueError, "The labels of task 'beta' are empty. Give a list of names, or a dict from output"),
    ({"beta": [0, 1]}, TypeError, "Task 'beta' has the label 0 (int), but a label is a text. Write '0' if that is its"),
    ({"beta": {0: True}}, TypeError, "Task 'beta' has the label True (bool), but a label is a text. Write 'True' if"),
    ({"beta": ["a", None]}, TypeError, "Task 'beta' has the label None (NoneType), but a label is a text."),
    ({"beta": ["a", " "]}, ValueError, "Task 'beta' has the label ' ', which is empty. Give every label a name."),
    ({"beta": ["a", "b", "a"]}, ValueError, "Task 'beta' has the labels ['a'] more than once. Give every label a name"),
    ({"beta": {"x": "a"}}, TypeError, "Task 'beta' has a label for output 'x' (str), but outputs are integers, from 0"),
    ({"beta": {"01": "a"}}, TypeError, "Task 'beta' has a label for output '01' (str), but outputs are integers"),
    ({"beta": {True: "a"}}, TypeError, "Task 'beta' has a label for output True (bool), but outputs are integers"),
    ({"beta": {-1: "a"}}, ValueError, "Task 'beta' has a label for output -1, but outputs count from 0."),
    ({"beta": {0: "a", "0": "b"}}, ValueError, "The labels of task 'beta', {0: 'a', '0': 'b'}, name an output twice."),
    (
        {"beta": {3: "a", 0: "b"}},
        ValueError,
        "Task 'beta' has labels for the outputs [3], but the classifier has 3, from 0. Load the base model with "
        "num_labels=4 or more, or correct the outputs.",
    ),
    (
        {"beta": ["spam", "ham"]},
        ValueError,
        "Task 'beta' has 2 labels, but the classifier has 3 outputs, which have no names. Say which outputs are the "
        "task's, as in {0: 'spam'}, or load the base model with id2label.",
    ),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD, ids=[case[2][:50] for case in BAD])
def test_wrong_labels_are_refused(labels: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        model(labels)
    made = model(None)
    if isinstance(labels, dict) and "delta" not in labels:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            made.set_labels("beta", labels["beta"])
        assert labels_of(made) is None
    if not isinstance(labels, dict) or not all(isinstance(key, str) for one in labels.values() for key in one):
        return
    # The same in a file.
    made.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_labels": labels}))
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)


def test_labels_are_for_classifiers() -> None:
    message = (
        "task_labels={'alpha': ['a']} are for classifiers, but task_type='CAUSAL_LM' has no classes. Leave them out"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter_config(task_type="CAUSAL_LM", task_labels={"alpha": ["a"]})


def test_labels_follow_the_tasks() -> None:
    made = model({"alpha": {0: "x"}, "gamma": {1: "y", 2: "z"}})
    made.rename_task("alpha", "first")
    made.remove_task("beta")
    made.interpolate_tasks("between", {"first": 1.0, "gamma": 1.0})
    assert labels_of(made) == {"first": {0: "x"}, "gamma": {1: "y", 2: "z"}}
    made.set_labels("between", {1: "w"})
    made.set_labels("gamma", None)
    made.set_labels("gamma", None)
    assert labels_of(made) == {"first": {0: "x"}, "between": {1: "w"}}
    made.remove_task("first")
    made.set_labels("between", None)
    assert labels_of(made) is None
    with pytest.raises(ValueError, match=r"Unknown task 'first'\. Known tasks: \['gamma', 'between'\]"):
        made.set_labels("first", {0: "x"})


def test_every_output_has_a_name_of_its_own() -> None:
    base = AdaptedModel("Net", config=NAMES, num_labels=3)
    labels: Any = {"a": {0: "spam", 2: "good"}, "b": {2: "bad"}}
    assert all_names(base, labels) == {0: "spam", 1: "LABEL_1", 2: "ham"}
    assert all_names(base, labels, "b") == {0: "spam", 1: "LABEL_1", 2: "bad"}
    assert all_names(base, labels, "a") == {0: "spam", 1: "LABEL_1", 2: "good"}
    assert all_names(base, {}) == {0: "news", 1: "spam", 2: "ham"}


@pytest.mark.parametrize("id2label", [None, [], {}, {"0": "a"}, {"0": "a", "1": 3}, {"0": "LABEL_0", "1": "LABEL_1"}])
def test_a_base_model_without_names(id2label: Any) -> None:
    assert own_names(AdaptedModel("Net", config={"id2label": id2label}, num_labels=2)) == {}
    assert own_names(AdaptedModel("Net", num_labels=2)) == {}


def test_a_file_cannot_ask_for_any_number_of_outputs() -> None:
    base = AdaptedModel("Net", config={"id2label": {"0": "a"}}, num_labels=2**31 - 1)
    assert own_names(base) == {}
    with pytest.raises(ValueError, match="num_labels=2147483647 must be at most 65536"):
        all_names(base, {})
