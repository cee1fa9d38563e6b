"""LoRAs of fused experts, in the form that PEFT's LoRA and vLLM read, and adapters of them from files."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

from hyperadapt import LoraGenerator, diagnose, distill, export_lora
from hyperadapt.diagnosis import measure
from hyperadapt.plots.adapter import adapter_figures
from hyperadapt.trainer.monitor import PositionMonitor
from tests.support.experts import MIXTURES, adapted, expert_norms, mixture, token_ids
from tests.support.helpers import TASKS, logits

FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("name", MIXTURES)
def test_pefts_lora_reads_an_export(name: str, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 2}
    if name == "gpt-oss":
        layers["layer_types"] = ["full_attention"] * 2
    # PEFT takes these names of linear layers, as DeepSeek has them, for those of experts before transformers 5.
    modules = {"target_modules": "all-linear", "exclude_modules": r".*\.(gate|up|down)_proj"}
    changes = modules if name == "deepseek v3" else {"target_modules": "all-linear"}
    model = adapted(mixture(name, **layers).float(), **changes)
    batch = {"input_ids": token_ids(2)}
    expected = logits(model, batch, tasks=TASKS[1])
    model.base_model.set_task(TASKS[1])
    updates = {
        layer.hyperadapter_position["default"].name: layer.get_delta_weight("default")
        for module in model.modules()
        for layer in (module.layers() if hasattr(module, "layers") and hasattr(module, "parameter_name") else ())
    }
    export_lora(model, TASKS[1], tmp_path)
    lora = PeftModel.from_pretrained(mixture(name, **layers).float(), str(tmp_path))
    torch.testing.assert_close(logits(lora, batch), expected, **FLOAT32)
    found = {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}": layer.get_delta_weight("default")
        for path, layer in lora.get_base_model().named_modules()
        if isinstance(layer, ParamWrapper)
    }
    assert found.keys() == updates.keys()
    for path, update in updates.items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-6)


def test_layers_that_peft_takes_for_experts_are_told(tmp_path: Path) -> None:
    model = adapted(mixture("deepseek v3").float(), target_modules=["down_proj", "gate_proj", "up_proj", "o_proj"])
    message = re.escape("exclude_modules=r'.*\\.(down_proj|gate_proj|up_proj)'. Or merge the task.")
    with pytest.warns(UserWarning, match=rf"mlp\.down_proj'.*type 'deepseek_v3'\. PEFT takes their names .* {message}"):
        export_lora(model, TASKS[0], tmp_path / "one")
    generator = LoraGenerator.from_model(model)
    with pytest.warns(UserWarning, match="PEFT takes their names for those of experts"):
        generator.save_all(tmp_path / "all", [TASKS[0]])
    # It is so: PEFT gives the experts twice the rank, and warns of what it does.
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match=r"size mismatch for .*layers\.1\.mlp\.experts"),
    ):
        PeftModel.from_pretrained(mixture("deepseek v3").float(), str(tmp_path / "one"))


def test_the_factors_of_an_export_are_those_of_the_adapter(tmp_path: Path) -> None:
    model = adapted(mixture().float(), r=4)
    export_lora(model, TASKS[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    experts = "model.layers.0.mlp.experts"
    assert config["target_parameters"] == [f"{experts}.down_proj", f"{experts}.gate_up_proj"]
    assert config["target_modules"] == []
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    network = model.base_model.hyperadapter_networks["default"]
    with torch.no_grad():
        factors = network(torch.tensor([0]))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    # vLLM takes the inner layer for gate_up_proj, and splits both as here: (experts, r, in), (experts, out, r).
    for name, end in (("down_proj", ""), ("gate_up_proj", ".base_layer")):
        key = f"base_model.model.{experts}{end}.lora_"
        lora_A, lora_B = (tensors.pop(f"{key}{factor}.weight") for factor in "AB")
        split_A = lora_A.reshape(4, -1, lora_A.shape[-1])
        split_B = lora_B.reshape(lora_B.shape[0], -1, 4).permute(2, 0, 1)
        own = factors[f"{experts}.{name}"]
        assert torch.equal(split_A[:, :4], own.lora_A[0])
        assert torch.equal(split_B[..., :4], own.outer()[0])
        assert not split_A[:, 4:].any()
        assert not split_B[..., 4:].any()
    assert not tensors


def test_an_adapter_goes_through_its_files(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 3}
    model = adapted(mixture(**layers), target_modules=["q_proj"], layers_to_transform=[1, 2])
    batch = {"input_ids": token_ids(3)}
    tasks = [TASKS[2], TASKS[0], TASKS[1]]
    expected = logits(model, batch, tasks=tasks)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(mixture(**layers), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, batch, tasks=tasks), expected)
        assert torch.equal(
            loaded.base_model.hyperadapter_networks["default"].base_norms,
            model.base_model.hyperadapter_networks["default"].base_norms,
        )
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["adapted_modules"]
    assert [block["layers"] for block in kept] == [[1, 2]]
    assert [one.get("experts") for one in kept[0]["modules"]] == [None, 4, 4]
    model.float()
    model.save_pretrained(tmp_path)
    generator = LoraGenerator.from_pretrained(tmp_path)
    export_lora(model, TASKS[1], tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    made = generator.state_dict(TASKS[1])
    assert made.keys() == exported.keys()
    assert all(torch.equal(made[name], exported[name]) for name in made)
    assert generator.lora_config.target_parameters == [
        f"model.layers.{index}.mlp.experts.{name}" for index in (1, 2) for name in ("down_proj", "gate_up_proj")
    ]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    adapted(mixture(), active=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"experts": 0}, "experts=0 must be at least 1"),
        (
            {"experts": 8},
            "tells of 12 adapted weights, but its file has the norms of as many base weights: base_norms of",
        ),
        ({"kind": "Linear"}, "experts=4 of 'model.layers.*.mlp.experts.down_proj' is not that of a Linear"),
    ):
        damaged = json.loads(json.dumps(whole))
        damaged["adapted_modules"][0]["modules"][0] |= changes
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=re.escape(message)):
            LoraGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["gguf-ready", "mlx"])
def test_other_formats_have_no_place_for_experts(format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"format='{format}' takes linear layers.* also adapts .*experts.down_proj"):
        export_lora(adapted(mixture()), TASKS[0], tmp_path, format=format)


def test_experts_are_not_distilled(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"adapts fused experts, \['model.layers.0.mlp.experts.down_proj', .*distilled"
    ):
        distill(adapted(mixture()), {TASKS[0]: tmp_path})


def test_experts_of_a_parameter_are_diagnosed_together() -> None:
    model = adapted(mixture(), normalization_bound=0.5)
    diagnosis = diagnose(model)
    assert diagnosis.positions == tuple(f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))
    for index, layer in enumerate(model.base_model.model.model.layers[0].mlp.experts.layers()):
        name = diagnosis.positions[index]
        for task, known in enumerate(TASKS):
            model.base_model.set_task(known)
            norms = expert_norms(layer.get_delta_weight("default"))
            assert float(diagnosis.norms[index, task]) == pytest.approx(float(norms.norm() / layer.weight.norm()))
            assert float(diagnosis.singular_values[name][task].norm()) == pytest.approx(float(norms.norm()))
    assert diagnosis.bound_shares is not None
    assert ((diagnosis.bound_shares > 0.5) & (diagnosis.bound_shares <= 1)).all()
    assert diagnosis.singular_values[name].shape == (len(TASKS), 4)


def test_pictures_and_monitor_take_experts() -> None:
    model = adapted(mixture(), target_modules=["q_proj"])
    network = model.base_model.hyperadapter_networks["default"]
    assert {"singular_values", "update_norms"} <= adapter_figures(network, measure(model)).keys()
    monitor = PositionMonitor(network)
    model.train()
    model(input_ids=token_ids(2), tasks=list(TASKS[:2])).logits.sum().backward()
    updates, seen, _ = monitor.collect()
    expected = measure(model, list(TASKS[:2])).norms.amax(1)
    assert list(updates.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(value > 0 for value in seen.values())
