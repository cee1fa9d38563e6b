"""What users of PEFT's LoRA call on a model: what a hyperadapter does not offer names the way instead."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraModel
from peft.utils.hotswap import hotswap_adapter

from hyperadapt import HyperAdapterModel
from hyperadapt.tuner.lora_only import LORA_ONLY
from tests.support.helpers import adapted_model, base_model


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted_model("llama")


def test_all_that_lora_alone_offers_is_listed() -> None:
    offered = {name for name in dir(LoraModel) if not name.startswith("_") and not hasattr(HyperAdapterModel, name)}
    assert offered == set(LORA_ONLY)


def test_the_way_instead_is_named(model: PeftModel) -> None:
    message = r"^A hyperadapter has no add_weighted_adapter, since one .* interpolate_tasks\(name, \{task: weight\}\)"
    for one in (model, model.base_model):
        with pytest.raises(AttributeError, match=message):
            one.add_weighted_adapter(["default"], [1.0], "mean")
        with pytest.raises(AttributeError, match=r"^A hyperadapter has no subtract_mutated_init, since it leaves"):
            one.subtract_mutated_init({}, "default")
        assert not any(hasattr(one, name) for name in LORA_ONLY)
        # Other names are the base model's, as in PEFT.
        with pytest.raises(AttributeError, match=r"^'LlamaForCausalLM' object has no attribute 'unheard_of'$"):
            one.unheard_of  # noqa: B018


def test_status_and_other_helpers_of_peft(model: PeftModel, tmp_path: Path) -> None:
    lora = get_peft_model(base_model("llama"), LoraConfig(target_modules="all-linear"))
    status, expected = model.get_model_status(), lora.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("HyperAdapterModel", {"default": "HYPERADAPTER"})
    for name in ("num_adapter_layers", "enabled", "active_adapters", "merged_adapters", "requires_grad", "devices"):
        assert getattr(status, name) == getattr(expected, name)
    assert [one.name for one in model.get_layer_status()] == [one.name for one in lora.get_layer_status()]
    model.save_pretrained(tmp_path)
    refused = {
        "scaling is only supported for models with `LoraLayer`s": lambda: rescale_adapter_scale(model, 0.5).__enter__(),
        "Hotswapping only supports LORA but HYPERADAPTER was": lambda: hotswap_adapter(model, str(tmp_path), "default"),
        "is not supported for HyperAdapterModel": lambda: model.save_pretrained(
            tmp_path, path_initial_model_for_weight_conversion=str(tmp_path)
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(AttributeError, match=r"'HyperAdapterLinear' object has no attribute 'set_scale'"):
        model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 2.0)
