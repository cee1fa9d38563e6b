"""Saving and loading: dtypes, memory, fully trained modules, and a fresh process."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.helpers import (
    MIXED,
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    example_batch,
    gradients,
    logits,
    make_active,
    run_python,
    trainable,
    two_adapters,
)

BATCH = example_batch("llama", labels=False)


def test_save_and_load_two_adapters(tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, adapter_name="other", is_trainable=True)
    loaded.load_adapter(tmp_path / "second", adapter_name="more", low_cpu_mem_usage=True)
    assert trainable(loaded) == set(adapter_parameters(loaded, "other"))
    for ours, theirs, tasks in (
        ("default", "other", MIXED),
        ("second", "more", ["one", "two", "two", "one"]),
    ):
        model.set_adapter(ours)
        loaded.set_adapter(theirs)
        assert torch.equal(logits(loaded, BATCH, tasks=tasks), logits(model, BATCH, tasks=tasks))


def test_modules_to_save(tmp_path: Path) -> None:
    model = adapted_model("bert", task_type="SEQ_CLS", target_modules=["query", "dense"])
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    batch = example_batch("bert")
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model(**batch, tasks=MIXED).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    assert torch.equal(logits(loaded, batch, tasks=MIXED), logits(model, batch, tasks=MIXED))
    head = loaded.get_base_model().classifier.modules_to_save["default"].weight
    assert not torch.equal(head, base_model("bert").classifier.weight)


@pytest.mark.parametrize(
    ("base_dtype", "autocast", "dtype"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_adapter_dtype(tmp_path: Path, base_dtype: torch.dtype, autocast: bool, dtype: torch.dtype) -> None:
    config = adapter_config(target_modules="all-linear")
    base = base_model("llama").to(base_dtype)
    model = make_active(get_peft_model(base, config, autocast_adapter_dtype=autocast))
    model.add_adapter("second", adapter_config(), autocast_adapter_dtype=autocast)
    for adapter_name in ("default", "second"):
        assert {parameter.dtype for parameter in adapter_parameters(model, adapter_name).values()} == {dtype}
        # Rounded to the base's precision, the unit of bounds and gains would stay wrong by up to 0.4 %.
        assert model.base_model.router.network(adapter_name).base_norms.dtype == torch.float32
    output = logits(model, BATCH, tasks=MIXED)
    assert output.dtype == base_dtype
    model(**example_batch("llama"), tasks=MIXED).loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {dtype}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    base = base_model("llama").to(base_dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast)
    assert {parameter.dtype for parameter in adapter_parameters(loaded).values()} == {dtype}
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), output)


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = adapted_model("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))


def test_state_dict_names() -> None:
    names = get_peft_model_state_dict(adapted_model("llama"))
    assert names
    assert all(name.startswith("base_model.hyperadapter_networks.") for name in names)
    assert not any("default" in name for name in names)
    assert "base_model.hyperadapter_networks.base_norms" in names


LOAD = """
import sys
import torch
import hyperadapt
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
batch = load_file(f"{folder}/batch.safetensors")
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
models = {
    "auto": AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter"),
    "peft": PeftModel.from_pretrained(base, f"{folder}/adapter"),
}
with torch.no_grad():
    logits = {
        f"{name} {task}": model(**batch, tasks=task).logits
        for name, model in models.items()
        for task in model.peft_config["default"].tasks
    }
save_file(logits, f"{folder}/logits.safetensors")
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = make_active(get_peft_model(base, adapter_config(task_type="CAUSAL_LM", target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    save_file(BATCH, tmp_path / "batch.safetensors")
    expected = {task: logits(model, BATCH, tasks=task) for task in TASKS}
    run_python(LOAD, tmp_path)
    results = load_file(tmp_path / "logits.safetensors")
    assert set(results) == {f"{name} {task}" for name in ("auto", "peft") for task in TASKS}
    for name, result in results.items():
        assert torch.equal(result, expected[name.split()[1]]), name
