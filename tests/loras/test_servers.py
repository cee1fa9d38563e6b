"""Formats of exports, read by the programs that they are for: llama.cpp's converter, mlx-lm and diffusers."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig

from hyperadapt import export_lora
from tests.support.helpers import TASKS, adapted_model, adapter_config, base_model, example_batch, logits, make_active
from tests.support.tolerances import EXPORT_FLOAT32, FLOAT32_FORMULA, FLOAT32_FORWARD

CLOSE = {"rtol": EXPORT_FLOAT32, "atol": EXPORT_FLOAT32}
PATTERNS = {"r": 3, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"v_proj": 2}}
LLAMA_CPP = os.environ.get("LLAMA_CPP")
MLX_PYTHON = os.environ.get("MLX_PYTHON", sys.executable if importlib.util.find_spec("mlx_lm") else "")

# What convert_lora_to_gguf.py calls the modules of a layer.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

MLX_READER = """
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_adapters, load_model

root = Path(sys.argv[1])
for folder in sys.argv[2:]:
    model, _ = load_model(root / "base")
    model = load_adapters(model, str(root / folder))
    model.eval()
    ids = mx.load(str(root / "ids.safetensors"))["ids"]
    mx.save_safetensors(str(root / folder / "logits.safetensors"), {"logits": model(ids)})
"""


def updates(model: nn.Module, task: str) -> dict[str, Tensor]:
    """Dense updates by module path."""
    factors = model.base_model.router.factors_of_task("default", task)
    return {name: one.delta_weight()[0] for name, one in factors.items()}


def halves_interleaved(update: Tensor, heads: int) -> Tensor:
    """As llama.cpp orders the outputs of q_proj and k_proj: of every head, first and second half in turns."""
    return update.reshape(heads, 2, -1, update.shape[1]).transpose(1, 2).reshape(update.shape)


@pytest.mark.skipif(
    not LLAMA_CPP,
    reason="LLAMA_CPP does not name a folder with llama.cpp's convert_lora_to_gguf.py, such as vendor/llama.cpp in the "
    "source distribution of llama-cpp-python",
)
def test_llama_cpp_converts_an_export(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model = adapted_model("llama", **PATTERNS)
    # As after loading a quantised base: the converter does not know this way of quantisation.
    model.get_base_model().config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    export_lora(model, "beta", tmp_path / "lora", format="gguf-ready")
    program = Path(str(LLAMA_CPP), "convert_lora_to_gguf.py")
    command = [sys.executable, program, "--base", tmp_path / "lora", tmp_path / "lora", "--outfile", tmp_path / "gguf"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reader = gguf.GGUFReader(tmp_path / "gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    expected = updates(model, "beta")
    assert len(tensors) == 2 * len(expected)
    config = model.get_base_model().config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, update in expected.items():
        layer, _, module = path.removeprefix("model.layers.").partition(".")
        lora_a, lora_b = (tensors[f"blk.{layer}.{GGUF_NAMES[module]}.weight.lora_{one}"] for one in "ab")
        ending = module.rpartition(".")[2]
        if ending in heads:
            update = halves_interleaved(update, heads[ending])
        scale = fields["adapter.lora.alpha"] / lora_b.shape[1]
        assert_close(scale * lora_b @ lora_a, update, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize(
    ("changes", "layers", "rank"),
    [
        ({}, 2, 8),
        (PATTERNS, 2, 16),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, 1, 8),
        ({"target_modules": r"model\.layers\.(0\.self_attn\.q|1\.mlp\.up)_proj"}, 2, 8),
    ],
)
def test_files_for_mlx(tmp_path: Path, changes: dict[str, Any], layers: int, rank: int) -> None:
    model = adapted_model("llama", **changes)
    base, folder = str(tmp_path / "base"), tmp_path / "lora"
    model.get_base_model().config.save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = base
    export_lora(model.double(), "beta", folder, format="mlx")
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "adapters.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["model"], config["fine_tune_type"], config["num_layers"]) == (base, "lora", layers)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["dropout"]) == (rank, 0)
    tensors = load_file(folder / "adapters.safetensors")
    expected = updates(model, "beta")
    assert tensors.keys() == {f"{path}.lora_{one}" for path in expected for one in "ab"}
    for path, update in expected.items():
        _, _, layer, key = path.split(".", 3)
        assert int(layer) >= 2 - layers
        assert key in parameters["keys"]
        lora_a, lora_b = (tensors[f"{path}.lora_{one}"] for one in "ab")
        assert (lora_a.shape, lora_b.shape) == ((update.shape[1], rank), (rank, update.shape[0]))
        scaled = parameters["scale"] * (lora_a @ lora_b).T
        assert_close(scaled, update.float(), rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)


@pytest.mark.skipif(
    not MLX_PYTHON,
    reason="mlx-lm is not installed; it may be elsewhere: MLX_PYTHON=path/to/python of an environment with mlx-lm (on "
    "Linux pip install 'mlx[cpu]' mlx-lm)",
)
def test_mlx_lm_computes_the_same(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    batch = example_batch("llama", labels=False)
    save_file({"ids": batch["input_ids"].int()}, tmp_path / "ids.safetensors")
    cases: list[dict[str, Any]] = [
        {},
        PATTERNS,
        {"target_modules": r"model\.layers\.(0\.self_attn\.q|1\.mlp\.up)_proj"},
    ]
    expected = {}
    for index, changes in enumerate(cases):
        model = adapted_model("llama", **changes)
        for task in TASKS[:2]:
            export_lora(model, task, tmp_path / f"{task}-{index}", format="mlx")
            expected[f"{task}-{index}"] = logits(model, batch, tasks=task)
    subprocess.run([MLX_PYTHON, "-c", MLX_READER, tmp_path, *expected], check=True)
    plain = logits(base_model("llama"), batch)
    for folder, live in expected.items():
        assert (live - plain).abs().max() > 0.1
        actual = load_file(tmp_path / folder / "logits.safetensors")["logits"]
        assert_close(actual, live, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def small_unet() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
    }
    sizes = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }
    return UNet2DConditionModel(cross_attention_dim=8, **sizes, **blocks).eval(), inputs


def small_transformer() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"caption_projection_dim": 16, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8),
    }
    model = SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **widths)
    return model.eval(), inputs


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize(
    ("make", "component", "target_modules"),
    [
        (small_unet, "unet", ATTENTION),
        (small_unet, "unet", [*ATTENTION, "conv1", "conv2", "proj_in"]),
        (small_transformer, "transformer", ATTENTION),
    ],
)
def test_diffusers_computes_the_same(
    tmp_path: Path, make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], component: str, target_modules: list[str]
) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    base, inputs = make()
    with torch.no_grad():
        plain = base(**inputs).sample
    model = make_active(get_peft_model(base, adapter_config(r=3, target_modules=target_modules)))
    with torch.no_grad():
        live, other = (model(**inputs, tasks=task).sample for task in ("beta", "alpha"))
    assert min((live - plain).abs().max(), (live - other).abs().max()) > 0.01
    export_lora(model, "beta", tmp_path / "lora", format="diffusers")
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert set((tmp_path / "lora").iterdir()) == {weights, tmp_path / "lora" / "README.md"}
    with safe_open(weights, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith(f"{component}.") for name in file.keys())  # noqa: SIM118
    assert (metadata[f"{component}.r"], metadata[f"{component}.lora_alpha"]) == (8, 8)

    by_model = make()[0]
    by_model.load_lora_adapter(str(tmp_path / "lora"), prefix=component, use_safetensors=True)
    # What load_lora_weights of the pipelines does.
    by_pipeline = make()[0]
    if component == "unet":
        state, alphas, fields = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(tmp_path / "lora"), return_lora_metadata=True
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, by_pipeline, metadata=fields)
    else:
        state, fields = SD3LoraLoaderMixin.lora_state_dict(str(tmp_path / "lora"), return_lora_metadata=True)
        SD3LoraLoaderMixin.load_lora_into_transformer(state, by_pipeline, metadata=fields)
    export_lora(model, "beta", tmp_path / "peft")
    by_peft = PeftModel.from_pretrained(make()[0], tmp_path / "peft").eval()
    for loaded in (by_model, by_pipeline, by_peft):
        with torch.no_grad():
            assert_close(loaded(**inputs).sample, live, **CLOSE)


@pytest.mark.parametrize("format", ["gguf-ready", "mlx"])
def test_models_of_diffusers_are_refused_elsewhere(tmp_path: Path, format: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = get_peft_model(small_unet()[0], adapter_config(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=f"^format='{format}' "):
        export_lora(model, "beta", tmp_path / "new", format=format)
    assert list(tmp_path.iterdir()) == []
