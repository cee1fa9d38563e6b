"""The method on encoder, decoder, encoder-decoder and vision models, with each normalisation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from hyperadapt.normalization import NORMALIZATIONS
from tests.support.helpers import (
    ARCHITECTURES,
    MIXED,
    TASK_TYPES,
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    base_weights,
    double,
    example_batch,
    gradients,
    logits,
    make_active,
    trainable,
    varied,
)
from tests.support.tolerances import FLOAT64_MODEL

EACH = pytest.mark.parametrize("name", ARCHITECTURES)
EACH_PAIR = pytest.mark.parametrize(
    ("name", "normalization"), varied(("llama", "soft_frobenius"), ARCHITECTURES, NORMALIZATIONS)
)
# What target_modules=None stands for; PEFT knows no default for vision transformers.
DEFAULTS = {"bert": {"query", "value"}, "gpt2": {"c_attn"}, "llama": {"q_proj", "v_proj"}, "t5": {"q", "v"}}


def targets(model: PeftModel) -> list[str]:
    return [position.name for position in model.base_model.router.network("default").positions]


def endings(model: PeftModel) -> set[str]:
    return {name.rpartition(".")[2] for name in targets(model)}


@EACH_PAIR
def test_start_equals_the_base_model_and_training_changes_only_the_adapter(name: str, normalization: str) -> None:
    model = adapted_model(name, active=False, normalization=normalization, task_type=TASK_TYPES[name]).eval()
    batch = example_batch(name)
    base, adapter = base_weights(model), adapter_parameters(model)
    expected = logits(base_model(name), batch)
    for tasks in (MIXED, "beta"):
        assert torch.equal(logits(model, batch, tasks=tasks), expected)

    head = {key for key in trainable(model) if "modules_to_save" in key}
    assert bool(head) == (TASK_TYPES[name] == "SEQ_CLS")
    assert trainable(model) == {*adapter, *head}
    before = {key: parameter.detach().clone() for key, parameter in adapter.items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.02)
    losses = []
    for step in range(10):
        loss = model.train()(**batch, tasks=MIXED).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert set(gradients(model)) == {*adapter, *head}
        optimizer.step()
        if step == 0:
            changed = {key for key, value in adapter.items() if not torch.equal(value, before[key])}
            assert changed
    assert losses[-1] < 0.9 * losses[0]
    unchanged = {key for key, value in adapter.items() if torch.equal(value, before[key])}
    assert not unchanged
    for key, value in base_weights(model).items():
        assert torch.equal(value, base[key]) != ("modules_to_save" in key), key


@EACH_PAIR
def test_round_trip_and_merge(tmp_path: Path, name: str, normalization: str) -> None:
    model = adapted_model(name, normalization=normalization, task_type=TASK_TYPES[name])
    batch = example_batch(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert type(loaded) is type(model)
    assert not trainable(loaded)
    for tasks in (MIXED, *TASKS):
        assert torch.equal(logits(loaded, batch, tasks=tasks), logits(model, batch, tasks=tasks))

    batch = double(batch)
    loaded.double().set_task("beta")
    live = logits(loaded, batch)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base_model(name))
    assert not any("hyperadapt" in f"{type(module).__module__} {key}" for key, module in merged.named_modules())
    assert merged.state_dict().keys() == base_model(name).state_dict().keys()
    assert_close(logits(merged, batch), live, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
    assert (live - logits(base_model(name).double(), batch)).abs().max() > 0.05


@EACH
def test_default_targets(name: str) -> None:
    if name in DEFAULTS:
        assert endings(adapted_model(name, target_modules=None)) == DEFAULTS[name]
    else:
        with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
            adapted_model(name, target_modules=None)


@EACH
def test_all_linear_targets_leave_out_the_output_layer(name: str) -> None:
    model = adapted_model(name, target_modules="all-linear", task_type=TASK_TYPES[name])
    base = model.get_base_model()
    kinds = (torch.nn.Linear, type(base_model("gpt2").transformer.h[0].mlp.c_fc))
    linear = {
        key.removesuffix(".base_layer")
        for key, module in base.named_modules()
        if isinstance(module, kinds) and not re.search("classifier|lm_head", key)
    }
    expected = linear | {key for key in targets(model) if key == "classifier" and name == "vit"}
    assert set(targets(model)) == expected


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "list": (
        {"target_modules": ["q_proj", "o_proj"]},
        [f"model.layers.{i}.self_attn.{key}_proj" for i in (0, 1) for key in "qo"],
    ),
    "full name": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, ["model.layers.1.mlp.up_proj"]),
    "regular expression": (
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
        ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
    ),
    "excluded": (
        {"target_modules": "all-linear", "exclude_modules": r".*(mlp|\.0\.).*"},
        [f"model.layers.1.self_attn.{key}_proj" for key in "qkvo"],
    ),
    "excluded list": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
    ),
    "layers": (
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"],
    ),
    "one layer": (
        {"target_modules": ["v_proj"], "layers_to_transform": 0},
        ["model.layers.0.self_attn.v_proj"],
    ),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selected_targets(tmp_path: Path, selection: str) -> None:
    changes, expected = SELECTIONS[selection]
    model, batch = adapted_model("llama", **changes), example_batch("llama")
    assert sorted(targets(model)) == sorted(expected)
    mixed = logits(model, batch, tasks=MIXED)
    assert not torch.equal(mixed, logits(base_model("llama"), batch))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert targets(loaded) == targets(model)
    assert torch.equal(logits(loaded, batch, tasks=MIXED), mixed)


def test_output_layer_named_explicitly() -> None:
    model = adapted_model("llama", target_modules=["lm_head"])
    assert targets(model) == ["lm_head"]
    batch = example_batch("llama")
    assert not torch.equal(logits(model, batch, tasks="beta"), logits(base_model("llama"), batch))


@pytest.mark.parametrize("head", ["row", "factor", "pair"])
def test_every_head_on_a_model(head: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base_model("gpt2"), adapter_config(head=head, target_modules="all-linear"))
    batch = example_batch("gpt2")
    assert torch.equal(logits(model.eval(), batch, tasks=MIXED), logits(base_model("gpt2"), batch))
    make_active(model).double()
    live = logits(model, batch, tasks="beta")
    model.set_task("beta")
    merged = logits(model.merge_and_unload(), batch)
    assert_close(merged, live, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
