"""Which parameters are adapted, and what is refused with its remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from hyperadapt.tuner.experts import HyperAdapterExperts
from tests.support.experts import PARAMETERS, adapted, mixture
from tests.support.helpers import adapted_model, adapter_config, base_weights


def adapted_names(model: nn.Module) -> list[str]:
    network = model.base_model.hyperadapter_networks["default"]
    return [position.name for position in network.positions]


def test_parameters_are_chosen_by_layer_and_module() -> None:
    layers = {"num_hidden_layers": 2}
    experts = [f"model.layers.{index}.mlp.experts.{name}" for index in (0, 1) for name in ("down_proj", "gate_up_proj")]
    assert adapted_names(adapted(mixture(**layers), active=False)) == experts
    one = adapted(mixture(**layers), active=False, layers_to_transform=[1])
    assert adapted_names(one) == experts[2:]
    one = adapted(mixture(**layers), active=False, exclude_modules=["layers.0.mlp.experts"])
    assert adapted_names(one) == experts[2:]
    one = adapted(mixture(**layers), active=False, target_parameters=["layers.0.mlp.experts.gate_up_proj"])
    assert adapted_names(one) == [experts[1]]


def test_modules_are_chosen_as_with_a_lora() -> None:
    by_default = adapted_names(adapted(mixture(), active=False, target_modules=None))
    assert {name.rpartition(".")[2] for name in by_default} == {"q_proj", "v_proj", "gate_up_proj", "down_proj"}
    # PEFT knows no default modules for this one.
    own = nn.ModuleDict({"experts": nn.ParameterDict({"w": torch.ones(2, 3, 4)})})
    model = adapted(own, active=False, target_modules=None, target_parameters=["experts.w"])
    assert adapted_names(model) == ["experts.w"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_parameters": ["experts.w1"]},
            "target_parameters holds 'experts.w1', but no parameter of MixtralForCausalLM has a name that ends so. The "
            "stacks of weights in it are ['model.layers.0.mlp.experts.gate_up_proj',",
        ),
        (
            {"target_parameters": ["mlp.gate.weight"]},
            "'model.layers.0.mlp.gate.weight' of target_parameters has shape (4, 16), but experts' weights have 3",
        ),
        (
            {"target_parameters": ["q_proj.weight"]},
            "'model.layers.0.self_attn.q_proj.weight' of target_parameters is the weight of a Linear, not of experts. "
            "Name its module in target_modules",
        ),
        (
            {"rank_pattern": {"gate_up_proj": 2}},
            "matches parameter 'model.layers.0.mlp.experts.gate_up_proj' of target_parameters, but patterns are for "
            "modules: experts get r and lora_alpha",
        ),
        (
            {"alpha_pattern": {"mlp.experts.down_proj": 32}},
            "alpha_pattern={'mlp.experts.down_proj': 32} matches parameter",
        ),
        (
            {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
            "are parameters of MixtralForCausalLM, but exclude_modules, modules_to_save or layers_to_transform leave",
        ),
    ],
)
def test_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    base = mixture()
    before = base_weights(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        adapted(base, active=False, **changes)
    assert base_weights(base).keys() == before.keys()
    adapted(base, active=False)


def test_weights_that_cannot_take_updates_are_refused() -> None:
    base = mixture()
    experts = base.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[2] = 0
    with pytest.raises(
        ValueError, match=r"weight of expert 2 of module 'model.layers.0.mlp.experts.down_proj' has.* 0.0"
    ):
        adapted(base, active=False)
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' of .* is spread over processes"):
        adapted(base, active=False)
    experts.gate_up_proj = nn.Parameter(torch.ones(4, 48, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"experts.gate_up_proj' of target_parameters is quantised \(torch.int8\)"):
        adapted(base, active=False)
    base = mixture()
    nn.utils.parametrize.register_parametrization(base.model.layers[0].mlp.experts, "gate_up_proj", nn.Identity())
    with pytest.raises(
        TypeError, match=r"'model.layers.0.mlp.experts.gate_up_proj' .* computed from others by a param"
    ):
        adapted(base, active=False)


def test_a_model_without_experts_is_told() -> None:
    with pytest.raises(ValueError, match=r"It has no stacks of weights; linear layers belong in target_modules"):
        adapted_model("llama", active=False, target_parameters=["experts.gate_up_proj"])


def test_adapters_of_a_model_have_the_same_parameters() -> None:
    model = adapted(mixture(), active=False)
    one = adapter_config(target_modules=[], target_parameters=PARAMETERS[:1])
    with pytest.raises(
        ValueError, match=r"another adapter of this model adapts .*must have the same ones, as with PEFT"
    ):
        model.add_adapter("second", one)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", adapter_config(target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, HyperAdapterExperts)]
    assert [list(layer.hyperadapter_position) for layer in layers] == [["default"]] * 2


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config`",
    "ignore:Adapter 'default' of this base model is replaced",
)
def test_replacing_an_adapter_unwraps_all_its_layers() -> None:
    model = adapted(mixture(), active=False)
    base = model.get_base_model()
    again = adapted(base, active=False, target_parameters=PARAMETERS[:1])
    assert sum(isinstance(module, HyperAdapterExperts) for module in again.modules()) == 1
