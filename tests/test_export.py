"""Export of a task as an ordinary LoRA folder that plain PEFT loads."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from hyperadapt import export, export_lora, generate_lora
from hyperadapt.config import NORMALIZATIONS
from tests.helpers import (
    TASK_TYPES,
    TASKS,
    adapted_model,
    base_model,
    example_batch,
    letters,
    logits,
    run_python,
    snapshot,
    two_adapters,
)
from tests.tolerances import EXPORT_FLOAT32

NAMES = ("bert", "gpt2", "llama", "t5")
# Short names where they mean the adapted modules and no others.
ENDINGS = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "t5": {"q", "k", "v", "o", "wi", "wo"}}
FILES = {"adapter_config.json", "adapter_model.safetensors"}

# The reader knows nothing of hyperadapters: it loads base models and folders with PEFT and writes logits.
READER = """
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

root = Path(sys.argv[1])
for job in json.loads((root / "jobs.json").read_text()):
    folder = root / job["folder"]
    base = getattr(transformers, job["class"]).from_pretrained(root / job["base"])
    model = PeftModel.from_pretrained(base, folder).eval()
    assert type(model).__name__ == job["peft_class"], type(model)
    batch = load_file(root / f"{job['base']}.safetensors")
    with torch.no_grad():
        save_file({"logits": model(**batch).logits}, folder / "logits.safetensors")
assert not any(name.partition(".")[0] == "hyperadapt" for name in sys.modules)
"""


def train_head(model: nn.Module) -> None:
    """Move the classifier, so that an export without it would differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(0.1)


def test_plain_peft_reproduces_the_live_task(tmp_path: Path) -> None:
    jobs, expected = [], {}
    for name in NAMES:
        batch = example_batch(name, labels=False)
        base_model(name).save_pretrained(tmp_path / name)
        save_file(batch, tmp_path / f"{name}.safetensors")
        for normalization in NORMALIZATIONS:
            # An update without a firm bound is not small against the base; its rounding would not be either.
            alpha = 0.5 if normalization in ("none", "adaptive") else 8
            model = adapted_model(name, normalization=normalization, lora_alpha=alpha, task_type=TASK_TYPES[name], r=3)
            train_head(model)
            live = [logits(model, batch, tasks=task) for task in TASKS]
            assert (live[0] - live[1]).abs().max() > 0.01
            for task, outputs in zip(TASKS[:2], live, strict=False):
                folder = f"{name}-{normalization}-{task}"
                export_lora(model, task, tmp_path / folder)
                expected[folder] = outputs
                kinds = {"class": type(base_model(name)).__name__, "peft_class": type(model).__name__}
                jobs.append({"folder": folder, "base": name} | kinds)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_python(READER, tmp_path)
    for folder, outputs in expected.items():
        result = load_file(tmp_path / folder / "logits.safetensors")["logits"]
        assert_close(
            result,
            outputs,
            rtol=EXPORT_FLOAT32,
            atol=EXPORT_FLOAT32,
            msg=lambda message, folder=folder: f"{folder}: {message}",
        )


@pytest.mark.parametrize("name", NAMES)
def test_files(tmp_path: Path, name: str) -> None:
    model = adapted_model(name, r=3, lora_alpha=6, task_type=TASK_TYPES[name])
    base, folder = tmp_path / "base", tmp_path / "export"
    base_model(name).config.save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    before = snapshot(model)
    export_lora(model, "beta", folder)
    assert {path.name for path in folder.iterdir()} == FILES
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.bias, config.init_lora_weights) == (3, 3, "none", True)
    assert (config.task_type, config.base_model_name_or_path) == (TASK_TYPES[name], str(base))
    assert not any((config.use_rslora, config.use_dora, config.rank_pattern, config.alpha_pattern))
    assert config.fan_in_fan_out == (name == "gpt2")
    positions = model.base_model.router.network("default").positions
    state = load_file(folder / "adapter_model.safetensors")
    wanted = {
        f"base_model.model.{position.name}.lora_{factor}.weight": (3, position.in_features)
        if factor == "A"
        else (position.out_features, 3)
        for position in positions
        for factor in "AB"
    }
    if name == "bert":
        wanted |= {"base_model.model.classifier.weight": (3, 32), "base_model.model.classifier.bias": (3,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    if name in ENDINGS:
        assert config.target_modules == ENDINGS[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_target_modules_name_no_other_module(tmp_path: Path) -> None:
    model = adapted_model("llama", target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    export_lora(model, "alpha", tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    batch = example_batch("llama")
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    close = {"rtol": EXPORT_FLOAT32, "atol": EXPORT_FLOAT32}
    assert_close(logits(loaded, batch), logits(model, batch, tasks="alpha"), **close)


def test_overwrites_its_own_files_only(tmp_path: Path) -> None:
    model = adapted_model("llama")
    (tmp_path / "README.md").write_text("mine")
    export_lora(model, "alpha", tmp_path)
    first = load_file(tmp_path / "adapter_model.safetensors")
    export_lora(model, "beta", str(tmp_path))
    second = load_file(tmp_path / "adapter_model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "README.md"}
    assert (tmp_path / "README.md").read_text() == "mine"
    assert any(not torch.equal(first[key], second[key]) for key in first)
    export_lora(model, "alpha", tmp_path)
    third = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_the_adapter_that_is_active_is_exported(tmp_path: Path) -> None:
    model = two_adapters()
    model.set_adapter("second")
    export_lora(model, "two", tmp_path / "new" / "folder")
    config = LoraConfig.from_pretrained(tmp_path / "new" / "folder")
    assert (config.r, config.target_modules) == (2, {"q_proj", "up_proj"})


def test_export_is_exact_while_merged(tmp_path: Path) -> None:
    model = adapted_model("llama")
    export_lora(model, "alpha", tmp_path / "live")
    model.set_task("beta")
    model.merge_adapter()
    export_lora(model, "alpha", tmp_path / "merged")
    live, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "merged"))
    assert all(torch.equal(live[key], merged[key]) for key in live)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("case", ["unknown task", "several adapters", "save fails", "config fails"])
def test_failures_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, existing: bool) -> None:
    model, folder = two_adapters(), tmp_path / "export"
    if existing:
        export_lora(model, "alpha", folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    task, error, message = "beta", OSError, "disk full"

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    if case == "unknown task":
        task, error, message = "delta", ValueError, f"Unknown task 'delta'. Known tasks: {TASKS}."
    elif case == "several adapters":
        model.base_model.set_adapter(["default", "second"])
        error, message = ValueError, "Only one adapter is exported, but ['default', 'second'] are active."
    elif case == "save fails":
        monkeypatch.setattr(export, "save_file", fail)
    else:
        monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
    with pytest.raises(error, match=re.escape(message)):
        export_lora(model, task, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not any(path.is_dir() and path != folder for path in tmp_path.rglob("*"))


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"directory={str(path)!r} is a file; pass a folder.")):
        export_lora(adapted_model("llama"), "alpha", path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_description_becomes_a_lora_folder(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_embedding": "text", "text_encoder": letters}
    model = adapted_model("llama", tasks={"alpha": "find the topic", "beta": "is it spam"}, **settings)
    description = "which language is it"
    generate_lora(model, description, tmp_path / "generated", text_encoder=letters)
    assert model.peft_config["default"].tasks == ["alpha", "beta"]
    batch = example_batch("llama", labels=False)
    plain = PeftModel.from_pretrained(base_model("llama"), tmp_path / "generated")
    assert isinstance(plain.peft_config["default"], LoraConfig)
    model.add_task("new", description=description, text_encoder=letters)
    expected = logits(model, batch, tasks="new")
    assert torch.allclose(logits(plain, batch), expected, rtol=EXPORT_FLOAT32, atol=EXPORT_FLOAT32)
    assert not torch.allclose(logits(model, batch, tasks="alpha"), expected, atol=1e-2)
    export_lora(model, "new", tmp_path / "exported")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("generated", "exported"))
    assert all(torch.equal(first[key], second[key]) for key in second)
    with pytest.raises(ValueError, match="was trained without descriptions"):
        generate_lora(adapted_model("llama"), description, tmp_path / "none")
    assert not (tmp_path / "none").exists()
