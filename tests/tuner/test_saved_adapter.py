"""Adapters read from their files alone: what survives saving, and files that cannot be trusted."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperadapt import HyperAdapterConfig
from hyperadapt.normalization.methods import default_bound
from hyperadapt.tuner import saved_adapter
from hyperadapt.tuner.saved_adapter import SavedAdapter, read_adapter
from tests.support.helpers import (
    adapted_model,
    adapter_config,
    base_model,
    letters,
    make_active,
    snapshot,
    two_adapters,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NETWORK = "base_model.hyperadapter_networks."
EMBEDDING, NORMS = f"{NETWORK}task_embedding.weight", f"{NETWORK}base_norms"
BASE = "base_model.model.model."
SETTINGS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted_model("llama", **SETTINGS).save_pretrained(str(tmp_path))
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(read: SavedAdapter, model: PeftModel, adapter_name: str = "default") -> None:
    network = model.base_model.router.network(adapter_name)
    assert read.network.positions == network.positions
    # Filled in when a model is saved.
    saving = {"inference_mode": True, "auto_mapping": read.network.config.auto_mapping}
    assert read.network.config.to_dict() == {**network.config.to_dict(), **saving}
    expected, found = snapshot(network), snapshot(read.network)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not read.network.training
    assert not any(parameter.requires_grad for parameter in read.network.parameters())


def test_positions_survive_every_way_of_saving(tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(str(tmp_path / "both"))
    assert_same(read_adapter(tmp_path / "both"), model)
    assert_same(read_adapter(tmp_path / "both" / "second"), model, "second")
    # Loaded under another name, changed, and saved from there.
    renamed = PeftModel.from_pretrained(base_model("llama"), tmp_path / "both" / "second", adapter_name="mine")
    renamed.rename_task("one", "first")
    renamed.add_task("three", embedding=torch.ones(8))
    renamed.save_pretrained(str(tmp_path / "renamed"))
    read = read_adapter(tmp_path / "renamed" / "mine")
    assert read.network.config.task_names == ["first", "two", "three"]
    assert_same(read, renamed, "mine")


def test_a_configuration_that_serves_two_models_tells_of_neither() -> None:
    config = HyperAdapterConfig(target_modules=["q_proj"])
    first, second = (get_peft_model(base_model("llama"), config) for _ in range(2))
    assert (config.adapted_modules, config.normalization_bound) == (None, None)
    made = [model.peft_config["default"] for model in (first, second)]
    assert made[0].adapted_modules == made[1].adapted_modules
    assert [one.normalization_bound for one in made] == 2 * [
        default_bound(len(first.base_model.router.network("default").positions))
    ]


def test_what_the_file_of_another_base_tells_is_replaced(folder: Path) -> None:
    change_config(folder, adapted_modules=[], adapted_model={"kind": "Other"})
    model = PeftModel.from_pretrained(base_model("llama"), folder)
    assert model.peft_config["default"].adapted_model["kind"] == "LlamaForCausalLM"
    model.save_pretrained(str(folder))
    assert_same(read_adapter(folder), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", [True, False])
def test_dtypes_are_those_of_a_model_that_is_loaded(tmp_path: Path, dtype: torch.dtype, cast: bool) -> None:
    text: dict[str, Any] = {"tasks": {"a": "one", "b": "two"}, "task_embedding": "both", "text_encoder": letters}
    config = adapter_config(target_modules=["q_proj"], **text)
    model = make_active(get_peft_model(base_model("llama").to(dtype), config, autocast_adapter_dtype=cast))
    model.save_pretrained(str(tmp_path))
    assert_same(read_adapter(tmp_path), PeftModel.from_pretrained(base_model("llama").to(dtype), tmp_path))


def test_what_is_read_is_no_window_into_the_file(folder: Path) -> None:
    read = read_adapter(folder)
    before = snapshot(read.network)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\1" * (folder / WEIGHTS).stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in read.network.state_dict().items())


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: weights.update({name: value})


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "empty": (
        lambda weights: weights.clear(),
        "lacks ['lm_head'], part of modules_to_save=['lm_head']. The file is damaged",
    ),
    "no head": (
        lambda weights: weights.pop("base_model.model.lm_head.weight"),
        "lacks ['lm_head'], part of modules_to",
    ),
    "another module": (
        put(f"{BASE}layers.0.mlp.up_proj.weight", torch.ones(2)),
        "up_proj.weight' is unexpected. Get b",
    ),
    "a longer name": (
        put("base_model.model.lm_head2.weight", torch.ones(2)),
        "'base_model.model.lm_head2.weight' is un",
    ),
    "no norms": (
        lambda weights: weights.pop(NORMS),
        "tells of 4 adapted weights, but its file has the norms of as many",
    ),
    "too few norms": (put(NORMS, torch.ones(3)), "as many base weights: base_norms of shape (3,). Get both again."),
    "missing": (lambda weights: weights.pop(EMBEDDING), f"do not fit its {CONFIG}: {EMBEDDING!r} is missing. Get both"),
    "added": (put(f"{NETWORK}more", torch.ones(2)), f"'{NETWORK}more' is unexpected"),
    "elsewhere": (put("model.lm_head.weight", torch.ones(2)), "'model.lm_head.weight' is unexpected"),
    "a factor": (put("base_model.model.x.lora_A.weight", torch.ones(2)), "'base_model.model.x.lora_A.weight' is unexp"),
    "shape": (put(EMBEDDING, torch.zeros(3, 9)), f"{EMBEDDING!r} has shape (3, 9) instead of (3, 8)"),
    "integers": (put(EMBEDDING, torch.zeros(3, 8, dtype=torch.int64)), f"{EMBEDDING!r} has dtype torch.int64 instead"),
    "zero norm": (put(NORMS, torch.tensor([1.0, 0, 1, 1])), f"{NORMS!r} holds a norm that is not finite and above 0"),
    "several": (lambda weights: [weights.pop(name) for name in list(weights) if "hypernetwork." in name], "; and "),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(folder: Path, case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter(folder)


def module(**changes: Any) -> list[dict[str, Any]]:
    return [{"modules": [{"name": "a", "in_features": 4, "out_features": 4} | changes]}]


def layers(first: Any, last: Any, **changes: Any) -> list[dict[str, Any]]:
    [block] = module(name="layers.*.q", **changes)
    return [{**block, "layers": [first, last]}]


BAD_CONFIGS: dict[str, tuple[Mapping[str, Any], type[Exception], str]] = {
    "no list": ({"adapted_modules": {"a": 1}}, TypeError, "adapted_modules={'a': 1} must be a list, not dict."),
    "no block": ({"adapted_modules": [3]}, TypeError, "An entry of adapted_modules=3 must be a dict, not int."),
    "unknown field": ({"adapted_modules": module(more=1)}, ValueError, "must have the fields name, in_features"),
    "no size": ({"adapted_modules": [{"modules": [{"name": "a"}]}]}, ValueError, "but must have the fields name, in_"),
    "size": ({"adapted_modules": module(in_features=2**31)}, ValueError, "in_features=2147483648 must be at most"),
    "no integer": ({"adapted_modules": module(out_features="4")}, TypeError, "out_features='4' must be an integer"),
    "kind": ({"adapted_modules": module(kind="LSTM")}, ValueError, "kind='LSTM' is unknown. Choose one of 'Linear'"),
    "no kernel": ({"adapted_modules": module(kind="Convolution")}, ValueError, "kernel=None of module 'a' is not that"),
    "kernel": (
        {"adapted_modules": module(kind="Convolution", kernel=[2, 3])},
        ValueError,
        "kernel=(2, 3) of module 'a' is not that of a Convolution with 4 inputs.",
    ),
    "kernel of another": ({"adapted_modules": module(kernel=[2, 2])}, ValueError, "kernel=(2, 2) of module 'a' is not"),
    "padding": (
        {"adapted_modules": module(kind="Embedding", padding_idx=4)},
        ValueError,
        "padding_idx=4 is none of module 'a'.",
    ),
    "backwards": (
        {"adapted_modules": layers(3, 1)},
        ValueError,
        "layers=[3, 1] of adapted_modules must be a first and",
    ),
    "endless": (
        {"adapted_modules": layers(0, 10**12)},
        ValueError,
        "layers=[0, 1000000000000] of adapted_modules must",
    ),
    "a million layers": (
        {"adapted_modules": layers(0, 10**6)},
        ValueError,
        "tells of 1,000,001 adapted weights, but its file has the norms of as many",
    ),
    "twice": ({"adapted_modules": 4 * module()}, ValueError, "adapted_modules names 'a' more than once."),
    "none": ({"adapted_modules": []}, ValueError, "tells of 0 adapted weights"),
    "others": ({"adapted_modules": layers(0, 3)}, ValueError, f"do not fit its {CONFIG}: "),
    "huge": (
        {"adapted_modules": layers(0, 3, in_features=2**30)},
        ValueError,
        "One task's adapters would hold 17,179,869,312 numbers, more than the limit of 1,073,741,824 (2**30, or 4 "
        "times its file).",
    ),
    "code": (
        {"adapted_model": {"kind": "A()\nimport os"}},
        ValueError,
        r"kind='A()\nimport os' of adapted_model is no",
    ),
    "more code": ({"adapted_model": {"kind": "A", "dtype": 'x", y='}}, ValueError, "of adapted_model is no name in Py"),
    "no kind": ({"adapted_model": {}}, ValueError, "An entry of adapted_model is {}, but must have the fields kind"),
    "modules": (
        {"adapted_model": {"kind": "A", "trained_modules": "x"}},
        TypeError,
        "trained_modules='x' must be a list",
    ),
    "labels": ({"adapted_model": {"kind": "A", "num_labels": "2"}}, TypeError, "num_labels='2' must be an integer"),
    "config": ({"adapted_model": {"kind": "A", "config": "x"}}, TypeError, "config='x' must be a dict or None"),
    "modules alone": ({"adapted_model": None}, ValueError, "tells of the adapted modules, but not of the base model"),
    "another method": ({"peft_type": "LORA"}, ValueError, "is of peft_type 'LORA', which is no hyperadapter."),
    "a number": ({"peft_type": [1]}, ValueError, "is of peft_type [1], which is no hyperadapter."),
    "rank": ({"r": 3}, ValueError, "heads.A_32_r4.weight' is unexpected; "),
    "pattern": ({"rank_pattern": {"q_proj": 2, "q_.*": 3}}, ValueError, "rank_pattern"),
    "text": (
        {
            "task_embedding": "text",
            "text_encoder": "x",
            "task_descriptions": dict.fromkeys(["alpha", "beta", "gamma"], "x"),
        },
        ValueError,
        "holds no vectors of its descriptions.",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_are_refused(folder: Path, case: str) -> None:
    changes, error, message = BAD_CONFIGS[case]
    change_config(folder, **changes)
    with pytest.raises(error, match=re.escape(message)):
        read_adapter(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}. Name a folder that save_pretrained wrote"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 10**5, '{"peft_type": "HYPERADAPTER", "tasks": ["\\ud800"]}'])
def test_a_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match="is no configuration of PEFT"):
        read_adapter(folder)


def test_a_truncated_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is damaged \(.*\)\. Get it again\."):
        read_adapter(folder)


def test_every_module_that_was_trained_in_full_is_needed(tmp_path: Path) -> None:
    # PEFT adds two names for classifiers, of which this one has the second.
    adapted_model("bert", task_type="SEQ_CLS", modules_to_save=["pooler"]).save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / WEIGHTS)
    read_adapter(tmp_path)
    for name in [name for name in weights if ".pooler." in name]:
        del weights[name]
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"lacks \['bert\.pooler'\], part of modules_to_save=\['pooler', 'classifier',"
    ):
        read_adapter(tmp_path)


def test_nothing_is_made_of_many_positions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_adapter, "positions_of", lambda config: pytest.fail("positions were made"))
    change_config(folder, adapted_modules=layers(0, 10**6))
    with pytest.raises(ValueError, match="tells of 1,000,001 adapted weights"):
        read_adapter(folder)
