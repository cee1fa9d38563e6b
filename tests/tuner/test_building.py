"""Names of adapters: PEFT leaves out of an adapter's file what has another adapter's name in its own."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.support.helpers import (
    MIXED,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    logits,
    make_active,
)

BATCH = example_batch("llama", labels=False)


@pytest.mark.parametrize(
    ("name", "part_of"),
    [
        ("trunk", "hyperadapter_networks.hypernetwork.trunk."),
        ("0", "hyperadapter_networks.hypernetwork.trunk.0."),
        ("hyperadapter_networks", "hyperadapter_networks."),
        ("lm_head", "model.lm_head.weight"),
    ],
)
@pytest.mark.parametrize("is_second", [True, False])
def test_a_name_that_would_thin_out_another_file_is_refused(name: str, part_of: str, is_second: bool) -> None:
    first, second = ("default", name) if is_second else (name, "default")
    model = make_active(get_peft_model(base_model("llama"), adapter_config(target_modules="all-linear"), first))
    before = logits(model, BATCH, tasks=MIXED)
    with pytest.raises(
        ValueError, match=f"adapter name '{name}' is a part of '{re.escape(part_of)}.*adapter 'default'"
    ):
        model.add_adapter(second, adapter_config(target_modules="all-linear"))
    assert list(model.peft_config) == [first]
    assert torch.equal(logits(model, BATCH, tasks=MIXED), before)


@pytest.mark.parametrize("is_second", [True, False])
def test_modules_to_save_count_as_well(is_second: bool) -> None:
    configs = {
        "default": adapter_config(target_modules=["query"], modules_to_save=["pooler"]),
        "dense": adapter_config(target_modules=["query"]),
    }
    first, second = sorted(configs, reverse=not is_second)
    model = get_peft_model(base_model("bert"), configs[first], first)
    with pytest.raises(ValueError, match=r"adapter name 'dense' is a part of 'model\.bert\.pooler\.modules_to_save\."):
        model.add_adapter(second, configs[second])


@pytest.mark.parametrize("name", ["layers", "q_proj", "default2"])
def test_names_of_modules_that_no_file_holds(name: str, tmp_path: Path) -> None:
    model = adapted_model("llama")
    model.add_adapter(name, adapter_config(target_modules="all-linear"))
    make_active(model)
    model.save_pretrained(tmp_path)
    for adapter_name, folder in (("default", tmp_path), (name, tmp_path / name)):
        model.set_adapter(adapter_name)
        loaded = PeftModel.from_pretrained(base_model("llama"), folder)
        assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))


def test_any_name_may_be_the_only_one(tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), adapter_config(target_modules="all-linear"), "trunk")
    expected = logits(make_active(model), BATCH, tasks=MIXED)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "trunk", adapter_name="trunk")
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), expected)


def test_a_reference_made_as_trl_makes_it_computes_what_the_trained_adapter_does() -> None:
    model = adapted_model("bert", normalization_bound=0.5, normalization_warmup=30)
    network = model.base_model.hyperadapter_networks["default"]
    network.warmup.trained_steps.fill_(12)
    batch = example_batch("bert")
    expected = logits(model, batch, tasks=MIXED)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, batch, tasks=MIXED), expected)
    # Another adapter begins at its own start.
    model.add_adapter("second", adapter_config(normalization_bound=0.5, normalization_warmup=30))
    assert model.base_model.hyperadapter_networks["second"].warmup.trained_steps == 0


@pytest.mark.parametrize("num_labels", [0, "three"])
def test_a_base_model_may_have_no_number_of_labels(num_labels: object) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    base.config = SimpleNamespace(num_labels=num_labels, to_dict=dict)
    model = get_peft_model(base, adapter_config(target_modules=["0"]))
    assert model.peft_config["default"].base_facts.num_labels is None
