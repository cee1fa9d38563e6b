"""Tests of the fields that say which modules are adapted: names, layers, ranks by pattern, refusals."""

import re
from typing import Any

import pytest

from hyperadapt.config import HyperAdapterConfig


def test_scaling_is_alpha_over_r() -> None:
    config = HyperAdapterConfig(r=4, lora_alpha=10, rank_pattern={"up": 8, r"^h\.0\.q": 2}, alpha_pattern={"up": 2})
    assert config.rank_and_scaling("h.0.down") == (4, 2.5)
    assert config.rank_and_scaling("h.0.up") == (8, 0.25)
    assert config.rank_and_scaling("h.0.q") == (2, 5.0)
    assert config.rank_and_scaling("g.h.0.q") == (4, 2.5)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_disagree_are_refused(name: str) -> None:
    # PEFT saves a dict in alphabetical order, so the first that matches would be another one after loading.
    config = HyperAdapterConfig(**{name: {"up": 8, "u.*": 4, "v": 2}})
    with pytest.raises(ValueError, match=f"^{name} gives module 'h.0.up' several values: {{'u.\\*': 4, 'up': 8}}."):
        config.rank_and_scaling("h.0.up")
    assert config.rank_and_scaling("h.0.v") != config.rank_and_scaling("h.0.q") == (8, 1.0)
    HyperAdapterConfig(**{name: {"up": 8, "u.*": 8}}).rank_and_scaling("h.0.up")


def test_forms_of_names_and_layers() -> None:
    names = {"up", "down"}
    for kind in (list, tuple, set, frozenset):
        config = HyperAdapterConfig(target_modules=kind(names), exclude_modules=kind(names))
        assert config.target_modules == config.exclude_modules == names
        assert sorted(HyperAdapterConfig(modules_to_save=kind(names)).modules_to_save) == ["down", "up"]
    # Subclasses for classification extend the list in place.
    mine = ["up"]
    assert HyperAdapterConfig(modules_to_save=mine).modules_to_save is not mine
    for layers in ((0, 2), range(0, 3, 2), [0, 2]):
        assert HyperAdapterConfig(layers_to_transform=layers).layers_to_transform == [0, 2]
    assert HyperAdapterConfig(layers_to_transform=3, layers_pattern=["h", "block"]).layers_to_transform == 3


# The field, the exception and the start of the message.
BAD_FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank_pattern": None}, TypeError, "rank_pattern=None must be a dict from module name or regular expression"),
    ({"rank_pattern": [["q", 2]]}, TypeError, "rank_pattern=[['q', 2]] must be a dict from module name"),
    ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern['q']=0 must be at least 1."),
    ({"rank_pattern": {"q": 2.0}}, TypeError, "rank_pattern['q']=2.0 must be an integer, not float."),
    ({"rank_pattern": {"q": True}}, TypeError, "rank_pattern['q']=True must be an integer, not bool."),
    ({"rank_pattern": {"": 2}}, ValueError, "key of rank_pattern='' is empty."),
    ({"rank_pattern": {2: 2}}, TypeError, "key of rank_pattern=2 must be a string, not int."),
    (
        {"rank_pattern": {"q(": 2}},
        ValueError,
        "key of rank_pattern='q(' is not a valid regular expression (missing ), unterminated subpattern). Correct it",
    ),
    # Valid alone, but not where PEFT puts it.
    ({"rank_pattern": {"(?i)q": 2}}, ValueError, "key of rank_pattern='(?i)q' is not a valid regular expression"),
    ({"alpha_pattern": {"q": 0}}, ValueError, "alpha_pattern['q']=0 must be a finite number above 0."),
    ({"alpha_pattern": {"q": float("nan")}}, ValueError, "alpha_pattern['q']=nan must be a finite number above 0."),
    ({"alpha_pattern": {"q": "8"}}, TypeError, "alpha_pattern['q']='8' must be a number, not str."),
    ({"target_modules": 3}, TypeError, "target_modules=3 must be a list of names, not int."),
    ({"target_modules": {"q": 1}}, TypeError, "target_modules={'q': 1} must be a list of names, not dict."),
    ({"target_modules": ["q", ["k"]]}, ValueError, "target_modules=['q', ['k']] holds ['k']; every entry needs"),
    ({"target_modules": [" "]}, ValueError, "target_modules=[' '] holds ' '; every entry needs to be a non-empty"),
    ({"target_modules": ""}, ValueError, "target_modules='' is empty. Write a name or a regular expression"),
    ({"target_modules": "*q"}, ValueError, "target_modules='*q' is not a valid regular expression (nothing to repeat)"),
    ({"target_modules": "(" * 5000}, ValueError, "target_modules='(((((((((((((((((((((((((((((((((((((...((("),
    ({"target_modules": "q{99999999999}"}, ValueError, "target_modules='q{99999999999}' is not a valid regular"),
    ({"exclude_modules": True}, TypeError, "exclude_modules=True must be a list of names, not bool."),
    ({"exclude_modules": "["}, ValueError, "exclude_modules='[' is not a valid regular expression"),
    ({"modules_to_save": "score"}, TypeError, "modules_to_save='score' must be a list of names, not str."),
    ({"modules_to_save": [""]}, ValueError, "modules_to_save=[''] holds ''; every entry needs to be a non-empty"),
    ({"modules_to_save": ["("]}, ValueError, "modules_to_save entry='(' is not a valid regular expression"),
    ({"layers_to_transform": "1"}, TypeError, "layers_to_transform='1' must be a layer index or a list of them."),
    ({"layers_to_transform": True}, TypeError, "layers_to_transform=True must be a layer index or a list of them."),
    ({"layers_to_transform": [0, 1.0]}, TypeError, "layers_to_transform=[0, 1.0] must be a layer index or a list"),
    ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform=[-1] holds a negative index; count from 0."),
    (
        {"layers_to_transform": 0, "layers_pattern": 1},
        TypeError,
        "layers_pattern=1 must be a list of names, not int.",
    ),
    (
        {"layers_to_transform": 0, "layers_pattern": ["(?P<idx>h)"]},
        ValueError,
        "layers_pattern='(?P<idx>h)' is not a valid regular expression (redefinition of group name 'idx'",
    ),
    ({"target_parameters": "experts.w"}, TypeError, "target_parameters='experts.w' must be a list of names, not str."),
    ({"target_parameters": [""]}, ValueError, "target_parameters=[''] holds ''; every entry needs to be a non-empty"),
    (
        {"target_parameters": ["w"]},
        ValueError,
        "target_parameters=['w'] holds 'w', the name of a parameter without that of its module. Write at least the "
        "module's last component before it, such as 'experts.w'.",
    ),
    (
        {"target_parameters": ["experts.w"], "lora_dropout": 0.1},
        ValueError,
        "lora_dropout=0.1 cannot be used with target_parameters=['experts.w']: experts get their input inside of their "
        "module, where no dropout can be put before the adapter alone. Set lora_dropout=0.",
    ),
    ({"bias": {}}, ValueError, "bias={} is not supported"),
    (
        {"bias": "all"},
        ValueError,
        "bias='all' is not supported: a hyperadapter generates weights, not biases. Use bias='none'; to train a module "
        "in full, name it in modules_to_save.",
    ),
    (
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        ValueError,
        "layers_to_transform=[1] cannot be used with target_modules='all-linear': indices select among listed names. "
        "Pass target_modules as a list, or ",
    ),
    (
        {"layers_pattern": "h"},
        ValueError,
        "layers_pattern='h' has no effect without layers_to_transform. Pass the layer indices as layers_to_transform, "
        "or drop layers_pattern.",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=[str(case[0])[:60] for case in BAD_FIELDS])
def test_wrong_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        HyperAdapterConfig(**fields)
    assert len(str(raised.value)) < 800
