"""Adapters that were saved before their positions were: the base model's config.json tells them."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hyperadapt.tuner.saved_adapter import read_adapter
from tests.support.helpers import TASK_TYPES, adapted_model, base_model, snapshot

KNOWN = [name for name, task_type in TASK_TYPES.items() if task_type]


def older(folder: Path, name: str, **changes: Any) -> Any:
    """A model of whose base only the configuration is saved, and whose adapter is saved without its positions."""
    model = adapted_model(name, task_type=TASK_TYPES[name])
    base_model(name).config.save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: fields[name] for name in fields if not name.startswith("adapted_")} | changes))
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_positions_come_from_the_configuration_of_the_base(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = older(tmp_path, name)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_: pytest.fail("weights were loaded"))
    network, known = read_adapter(tmp_path).network, model.base_model.router.network("default")
    assert network.positions == known.positions
    assert network.config.base_facts == known.config.base_facts
    assert all(torch.equal(value, snapshot(network)[key]) for key, value in snapshot(known).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": None}, "task_type=None with base_model_name_or_path='BASE' does not tell how its base model is"),
        ({"base_model_name_or_path": None}, "task_type='CAUSAL_LM' with base_model_name_or_path=None does not tell"),
    ],
)
def test_a_base_that_is_not_known(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    older(tmp_path, "llama", **changes)
    with pytest.raises(ValueError, match=re.escape(message.replace("BASE", str(tmp_path / "base")))):
        read_adapter(tmp_path)


def test_other_threads_get_weights_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older(tmp_path, "llama")
    layers, from_config = [], LlamaForCausalLM._from_config

    def making(*args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: layers.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return from_config(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "_from_config", making)
    read_adapter(tmp_path)
    assert [layer.weight.device.type for layer in layers] == ["cpu"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    older(tmp_path, "llama")
    base_model("gpt2").config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="not found in the base model"):
        read_adapter(tmp_path)
