"""Tests of the configuration: defaults, forms of tasks, saving and loading, refusals; not the normalisation's."""

import copy
import dataclasses
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hyperadapt.config import HyperAdapterConfig

# In an order that is not the alphabetical one, in which PEFT writes the keys of a dict.
DESCRIPTIONS = {"trec": "What does a question ask for?", "boolq": "Is it so?", "sst2": "Is it praise?"}

# No field has its default. Fixed values: `peft_type`, `peft_version` and `plugin`; `bias` has only one legal value,
# and `target_parameters` none beside a dropout (test_expert_export.py saves it). Options of other normalisations must
# be None; test_normalization_fields.py saves and loads them.
FULL = {
    "task_type": "SEQ_CLS",
    "auto_mapping": {"base_model_class": "Bert"},
    "base_model_name_or_path": "base",
    "revision": "v1",
    "inference_mode": True,
    "r": 3,
    "lora_alpha": 4.5,
    "lora_dropout": 0.25,
    "rank_pattern": {"query": 2},
    "alpha_pattern": {"value": 1.5},
    "target_modules": ["query", "value"],
    "exclude_modules": ["pooler"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layer",
    "modules_to_save": ["classifier"],
    "tasks": DESCRIPTIONS,
    "default_task": "sst2",
    "own_factors": ["boolq"],
    "task_labels": {"boolq": {0: "no", 1: "yes"}},
    "task_embedding": "both",
    "conditioning": "additive",
    "text_encoder": "encoder",
    "text_encoder_revision": "v2",
    "text_embedding_dim": 5,
    "task_embedding_dim": 7,
    "hypernetwork_dim": 9,
    "hypernetwork_depth": 1,
    "head": "pair",
    "normalization": "soft_frobenius",
    "normalization_bound": 0.125,
    "normalization_warmup": 7,
    "init_weights": "zero_head",
    "adapted_model": {"kind": "BertModel", "library": "transformers", "dtype": "bfloat16", "num_labels": 2},
    "adapted_modules": [
        {"modules": [{"name": "words", "in_features": 9, "out_features": 4, "kind": "Embedding", "padding_idx": 0}]},
        {"layers": [0, 2], "modules": [{"name": "layer.*.query", "in_features": 4, "out_features": 4}]},
    ],
}


def test_defaults_are_valid() -> None:
    config = HyperAdapterConfig()
    assert config.tasks == ["default"]
    assert (config.default_task, config.fallback_task) == (None, "default")
    assert config.task_descriptions is None
    assert config.normalization == "soft_polar"
    assert (config.normalization_bound, config.normalization_warmup) == (None, 30)
    assert config.peft_type == "HYPERADAPTER"
    assert HyperAdapterConfig().tasks is not config.tasks


def test_a_dict_of_tasks_is_split_into_names_and_descriptions() -> None:
    config = HyperAdapterConfig(tasks=DESCRIPTIONS)
    assert config.tasks == ["trec", "boolq", "sst2"]
    assert config.task_descriptions == DESCRIPTIONS
    assert config.fallback_task == "trec"
    assert HyperAdapterConfig(tasks=DESCRIPTIONS, default_task="boolq").fallback_task == "boolq"


@pytest.mark.parametrize("tasks", [["trec", "boolq"], ("trec", "boolq")])
def test_a_sequence_of_tasks_keeps_its_order(tasks: Any) -> None:
    config = HyperAdapterConfig(tasks=tasks, task_descriptions={"boolq": "Is it so?"})
    assert config.tasks == ["trec", "boolq"]
    assert config.task_descriptions == {"boolq": "Is it so?"}


@pytest.mark.parametrize(
    ("tasks", "descriptions"), [(list(DESCRIPTIONS), dict(DESCRIPTIONS)), (dict(DESCRIPTIONS), None)]
)
def test_the_callers_objects_are_neither_changed_nor_kept(tasks: Any, descriptions: Any) -> None:
    before = copy.deepcopy((tasks, descriptions))
    config = HyperAdapterConfig(tasks=tasks, task_descriptions=descriptions)
    assert (tasks, descriptions) == before
    tasks.clear()
    if descriptions:
        descriptions.clear()
    assert config.tasks == list(DESCRIPTIONS)
    assert config.task_descriptions == DESCRIPTIONS


def test_the_full_config_has_no_default_left() -> None:
    config = HyperAdapterConfig(**FULL)
    default = HyperAdapterConfig()
    same = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) == getattr(default, field.name)
    }
    others = {f"normalization_{option}" for option in ("ridge", "factors", "iterations", "temperature")}
    others |= {"example_dim", "example_classes"}
    assert same == {"peft_type", "peft_version", "plugin", "bias", "target_parameters"} | others


@pytest.mark.parametrize("config_class", [PeftConfig, HyperAdapterConfig])
@pytest.mark.parametrize("arguments", [FULL, {}, {"target_modules": "all-linear", "layers_to_transform": None}])
def test_a_saved_config_loads_equal(tmp_path: Path, config_class: type[PeftConfig], arguments: dict[str, Any]) -> None:
    config = HyperAdapterConfig(**arguments)
    config.save_pretrained(str(tmp_path))
    loaded = config_class.from_pretrained(str(tmp_path))
    assert type(loaded) is HyperAdapterConfig
    assert loaded == config
    assert loaded.tasks == list(arguments.get("tasks", ["default"]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(duplicate: Any) -> None:
    config = HyperAdapterConfig(**FULL)
    other = duplicate(config)
    assert other == config
    other.tasks.append("new")
    other.task_descriptions["new"] = "A new one."
    assert config == HyperAdapterConfig(**FULL)


# Configuration, exception, and what the message must say: the offending value, the cause and a remedy.
BAD = [
    ({"r": 0}, ValueError, "r=0 must be at least 1."),
    ({"r": -1}, ValueError, "r=-1 must be at least 1."),
    ({"r": 1.5}, TypeError, "r=1.5 must be an integer, not float."),
    ({"r": True}, TypeError, "r=True must be an integer, not bool."),
    ({"r": "8"}, TypeError, "r='8' must be an integer, not str."),
    *(
        case
        for name in ("task_embedding_dim", "hypernetwork_dim", "hypernetwork_depth")
        for case in (
            ({name: 0}, ValueError, f"{name}=0 must be at least 1."),
            ({name: 64.0}, TypeError, f"{name}=64.0 must be an integer, not float."),
            ({name: None}, TypeError, f"{name}=None must be an integer, not NoneType."),
        )
    ),
    ({"lora_alpha": 0}, ValueError, "lora_alpha=0 must be a finite number above 0."),
    ({"lora_alpha": -1}, ValueError, "lora_alpha=-1 must be a finite number above 0."),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha=nan must be a finite number above 0."),
    ({"lora_alpha": math.inf}, ValueError, "lora_alpha=inf must be a finite number above 0."),
    ({"lora_alpha": "8"}, TypeError, "lora_alpha='8' must be a number, not str."),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout=-0.1 must be in [0, 1)."),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout=1.0 must be in [0, 1)."),
    ({"lora_dropout": None}, TypeError, "lora_dropout=None must be a number, not NoneType."),
    ({"head": "column"}, ValueError, "head='column' is unknown. Choose one of 'row', 'factor', 'pair'."),
    (
        {"normalization": "spectrall"},
        ValueError,
        "normalization='spectrall' is unknown. Choose one of 'none', ",
    ),
    (
        {"init_weights": "gaussian"},
        ValueError,
        "init_weights='gaussian' is unknown. Choose one of True, False, ",
    ),
    ({"init_weights": None}, ValueError, "init_weights=None is unknown. Choose one of True, False, "),
    (
        {"task_type": "SOLVE"},
        ValueError,
        "Invalid task type: 'SOLVE'. Must be one of the following task types: ",
    ),
    ({"tasks": []}, ValueError, "tasks=[] names no task. Name at least one"),
    ({"tasks": {}}, ValueError, "tasks=[] names no task. Name at least one"),
    ({"tasks": "trec"}, TypeError, "tasks='trec' must be a list of names or a dict * not str."),
    ({"tasks": 2}, TypeError, "tasks=2 must be a list of names or a dict from name to description, not int."),
    ({"tasks": None}, TypeError, "tasks=None must be a list of names or a dict * not NoneType."),
    ({"tasks": ["a", ""]}, ValueError, "tasks=['a', ''] holds ''; every task needs a non-empty name."),
    (
        {"tasks": ["a", " \t"]},
        ValueError,
        r"tasks=['a', ' \t'] holds ' \t'; every task needs a non-empty name.",
    ),
    ({"tasks": ["a", 1]}, ValueError, "tasks=['a', 1] holds 1; every task needs a non-empty name."),
    (
        {"tasks": ["a"], "own_factors": ["b"]},
        ValueError,
        "own_factors names 'b', which is not among the tasks ['a']. Leave it out.",
    ),
    ({"tasks": ["a"], "own_factors": "a"}, TypeError, "own_factors='a' must be a list of names, not str."),
    ({"tasks": {1: "One."}}, ValueError, "tasks=[1] holds 1; every task needs a non-empty name."),
    (
        {"tasks": ["a", "b", "a"]},
        ValueError,
        "tasks=['a', 'b', 'a'] names ['a'] more than once; task names must be unique.",
    ),
    (
        {"tasks": ["a"], "default_task": "b"},
        ValueError,
        "default_task='b' is not among the tasks ['a']. Name one of them.",
    ),
    ({"tasks": ["a"], "default_task": ["a"]}, ValueError, "default_task=['a'] is not among the tasks ['a']."),
    (
        {"tasks": ["a"], "task_descriptions": {"b": "B."}},
        ValueError,
        "task_descriptions describes 'b', which is not among the tasks ['a']. Add it to tasks, or drop its ",
    ),
    (
        {"tasks": ["a"], "task_descriptions": ["A."]},
        TypeError,
        "task_descriptions=['A.'] must be a dict from task name to description, not list.",
    ),
    (
        {"lora_r": 8},
        TypeError,
        "HyperAdapterConfig got an unexpected keyword argument 'lora_r'. Did you mean 'r'?",
    ),
    (
        {"target_module": ["q"]},
        TypeError,
        "HyperAdapterConfig got an unexpected keyword argument 'target_module'. Did you mean 'target_modules'?",
    ),
    ({"tasks": {"a": ""}}, ValueError, "The description of task 'a' is ''; write a non-empty text, or a list"),
    ({"tasks": {"a": None}}, ValueError, "The description of task 'a' is None; write a non-empty text"),
    (
        {"tasks": {"a": "A."}, "task_descriptions": {"a": "A."}},
        ValueError,
        "tasks={'a': 'A.'} already gives descriptions, and so does task_descriptions. Pass one of the two.",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_configs_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    # " * " stands for any words between two parts of the message.
    pattern = r" .*".join(re.escape(part) for part in message.split(" * "))
    with pytest.raises(error, match=f"^{pattern}"):
        HyperAdapterConfig(**arguments)
