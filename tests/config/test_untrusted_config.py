"""Configurations from files that cannot be trusted: one clear error, before any memory is taken."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.tuner import loading
from hyperadapt.tuner.layer import HyperAdapterLayer
from tests.support.helpers import adapter_config, base_model, run_python, snapshot


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_unwrapped(base: nn.Module, before: dict[str, Tensor]) -> None:
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, HyperAdapterLayer | ModulesToSaveWrapper) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert not base._forward_pre_hooks


# Wrong values beside those of test_config.py: the field, the exception and the start of the message.
BAD_FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 65537}, ValueError, "r=65537 must be at most 65536."),
    ({"r": 2**200}, ValueError, "r=<integer of 201 bits> must be at most 65536."),
    ({"task_embedding_dim": 10**9}, ValueError, "task_embedding_dim=1000000000 must be at most 65536."),
    ({"hypernetwork_dim": 10**9}, ValueError, "hypernetwork_dim=1000000000 must be at most 65536."),
    ({"hypernetwork_depth": 257}, ValueError, "hypernetwork_depth=257 must be at most 256."),
    ({"lora_alpha": 10**400}, ValueError, "lora_alpha=<integer of 1329 bits> must be at most 1e+30."),
    ({"lora_alpha": [8]}, TypeError, "lora_alpha=[8] must be a number, not list."),
    (
        {"normalization": "sinkhorn", "normalization_iterations": 10**6},
        ValueError,
        "normalization_iterations=1000000 must be at most 1000.",
    ),
    ({"head": ["row"]}, ValueError, "head=['row'] is unknown. Choose one of 'row', 'factor', 'pair'."),
    ({"normalization": {"a": 1}}, ValueError, "normalization={'a': 1} is unknown. Choose one of 'none', "),
    ({"init_weights": 1}, ValueError, "init_weights=1 is unknown. Choose one of True, False, "),
    ({"task_type": ["CAUSAL_LM"]}, TypeError, "task_type=['CAUSAL_LM'] must be the name of a task type or None"),
    ({"inference_mode": "no"}, TypeError, "inference_mode='no' must be True or False, not str."),
    ({"auto_mapping": ["a"]}, TypeError, "auto_mapping=['a'] must be a dict or None, not list."),
    ({"base_model_name_or_path": 1}, TypeError, "base_model_name_or_path=1 must be a string or None, not int."),
    ({"revision": []}, TypeError, "revision=[] must be a string or None, not list."),
    ({"peft_version": 0.21}, TypeError, "peft_version=0.21 must be a string or None, not float."),
    ({"plugin": None}, TypeError, "plugin=None must be a string, not NoneType."),
    ({"default_task": {}}, ValueError, "default_task={} is not among the tasks ['default']. Name one of them."),
    ({"tasks": [["a"]]}, ValueError, "tasks=[['a']] holds ['a']; every task needs a non-empty name."),
    ({"tasks": ["x" * 1000] * 2}, ValueError, "tasks=['xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxx"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=[str(case[0])[:60] for case in BAD_FIELDS])
def test_wrong_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        HyperAdapterConfig(**fields)
    assert len(str(raised.value)) < 800


@pytest.mark.parametrize("config_class", [PeftConfig, HyperAdapterConfig])
def test_unknown_fields_of_a_file(tmp_path: Path, config_class: type[PeftConfig]) -> None:
    adapter_config().save_pretrained(str(tmp_path))
    change_config(tmp_path, temperature=3, schedule={"a": 1})
    message = "HyperAdapterConfig has no field 'temperature', 'schedule'. The file was saved by a newer hyperadapt"
    with pytest.raises(ValueError, match=f"^{message} or peft: upgrade them, or remove the field"):
        config_class.from_pretrained(str(tmp_path))


def test_an_unknown_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        HyperAdapterConfig(temperature=3)


def test_wrong_fields_of_a_file(tmp_path: Path) -> None:
    adapter_config().save_pretrained(str(tmp_path))
    change_config(tmp_path, r="8")
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(TypeError, match=r"^r='8' must be an integer, not str\.$"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unwrapped(base, before)


# What makes each part of the network too large, and the remedy that the message must name.
HUGE = {
    "heads": ({"r": 8192, "hypernetwork_dim": 4096}, r"in heads\. Reduce r, rank_pattern or hypernetwork_dim, or"),
    "trunk": ({"hypernetwork_dim": 2048, "hypernetwork_depth": 256}, r"in trunk\. Reduce hypernetwork_dim or"),
    "task_embedding": (
        {"task_embedding_dim": 65536, "tasks": [str(task) for task in range(20_000)]},
        r"in task_embedding\. Reduce task_embedding_dim or the number of tasks\.",
    ),
    "descriptions": (
        {
            "tasks": {"a": [str(index) for index in range(20_000)]},
            "task_embedding": "text",
            "text_encoder": "encoder",
            "text_embedding_dim": 65536,
        },
        r"in descriptions\. Reduce text_embedding_dim or the number of descriptions\.",
    ),
    "inputs": (
        {"task_embedding_dim": 65536, "hypernetwork_dim": 8192},
        r"in inputs\. Reduce task_embedding_dim or hypernetwork_dim\.",
    ),
    "adapters": (
        {"r": 65536, "hypernetwork_dim": 1, "head": "row"},
        r"^One task's adapters would hold [\d,]+ numbers, more than the limit of 1,073,741,824 \(2\*\*30, or 4",
    ),
}


@pytest.mark.parametrize("part", HUGE)
def test_huge_networks_are_refused_before_they_take_memory(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, message = HUGE[part]
    sizes = []
    # The context finds the functions that it changes once, when it is first used: before one of them is replaced.
    with torch.device("meta"):
        torch.empty(0)
    original = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: sizes.append(tensor := original(*size)) or tensor)
    config = adapter_config(target_modules=["q_proj"], modules_to_save=["lm_head"], **fields)
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert all(tensor.is_meta for tensor in sizes)
    assert_unwrapped(base, before)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_limit_is_exact_and_grows_with_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 2))
    config = adapter_config(target_modules=["0"])
    model = get_peft_model(copy.deepcopy(base), config)
    size = sum(parameter.numel() for parameter in model.base_model.hyperadapter_networks.parameters())
    monkeypatch.setattr(loading, "MAX_PARAMETERS", size)
    get_peft_model(copy.deepcopy(base), config)
    monkeypatch.setattr(loading, "MAX_PARAMETERS", size - 1)
    with pytest.raises(ValueError, match=f"^The network would have {size:,} parameters, more than the limit of"):
        get_peft_model(copy.deepcopy(base), config)
    get_peft_model(nn.Sequential(*base, nn.Linear(size // 4, 1)), config)


def test_measuring_a_network_leaves_the_random_numbers_alone() -> None:
    positions = [Position(f"layers.{index}.q", 8, 8, 4) for index in range(3)]
    state = torch.get_rng_state()
    loading.check_size(adapter_config(head="row", normalization="sinkhorn"), positions, 0, "the base model")
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_plugin_the_file_names_the_package(tmp_path: Path) -> None:
    adapter_config().save_pretrained(str(tmp_path))
    code = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print(repr(error))
assert "hyperadapt" not in sys.modules
"""
    assert run_python(code, tmp_path).stdout.strip() == "KeyError('HYPERADAPTER')"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["plugin"] == "pip install hyperadapt, then import hyperadapt before loading this adapter"
    # A later version may word it differently.
    change_config(tmp_path, plugin="ask")
    assert HyperAdapterConfig.from_pretrained(tmp_path).plugin == config["plugin"]
