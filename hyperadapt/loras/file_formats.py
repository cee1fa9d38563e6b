"""The files of an exported LoRA, in the format of each program that reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from hyperadapt.config.checks import shown
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.loras.lora import Lora
from hyperadapt.loras.tensor_files import write_tensors

_PREFIX = "base_model.model."
BASE_CONFIG, _MLX_WEIGHTS = "config.json", "adapters.safetensors"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_DECODER_LAYER = re.compile(r"model\.layers\.(?P<index>\d+)\.(?P<key>.+)")


def peft_tensors(lora: Lora) -> dict[str, Tensor]:
    """The tensors by their names in a file of PEFT."""
    return lora.named_factors(_PREFIX) | dict(lora.family.saved)


def _write_peft(lora: Lora, folder: Path) -> None:
    """What PEFT, vLLM, SGLang and other servers load; of a task with labels also a config.json that names them."""
    lora.family.files.write(peft_tensors(lora), folder / SAFETENSORS_WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(lora.family.config_file, encoding="utf-8")
    if lora.has_labels:
        write_base_config(lora, folder)


def write_base_config(lora: Lora, folder: Path) -> None:
    """The base model's config.json, if it is known, with the labels of the LoRA's task, if it has any."""
    if lora.base_config is None:
        return
    text = json.dumps(lora.base_config, indent=2, sort_keys=True)
    (folder / BASE_CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _write_gguf_ready(lora: Lora, folder: Path) -> None:
    """What llama.cpp's convert_lora_to_gguf.py reads, with the config.json that it reads of the base model."""
    if lora.family.base.config is None:
        raise ValueError(
            f"format='gguf-ready' is for models of transformers, which llama.cpp can convert, but the base model is a "
            f"{lora.family.base.kind}. Choose another format."
        )
    _check_modules(lora, "gguf-ready", "linear layers (not Conv1D, which llama.cpp's converter transposes)", _is_linear)
    _write_peft(lora, folder)
    write_base_config(lora, folder)


def _write_mlx(lora: Lora, folder: Path) -> None:
    """The adapter folder of mlx-lm, which numbers layers from the last one."""
    _check_modules(lora, "mlx", "linear layers in model.layers", _is_in_decoder_layer)
    matches = [match for match in map(_DECODER_LAYER.fullmatch, lora.factors) if match is not None]
    layers = max(lora.family.base.decoder_layers or 0, *(int(match["index"]) + 1 for match in matches))
    config = {
        "model": lora.family.adapter.base_model_name_or_path,
        "fine_tune_type": "lora",
        "num_layers": layers - min(int(match["index"]) for match in matches),
        "lora_parameters": {
            "rank": lora.family.r,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({match["key"] for match in matches}),
        },
    }
    ends = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    tensors = {
        # MLX reads no float64.
        f"{path}.{ends[end]}": (tensor.float() if tensor.dtype == torch.float64 else tensor).T.contiguous()
        for path, pair in lora.factors.items()
        for end, tensor in pair.items()
    }
    write_tensors(tensors, folder / _MLX_WEIGHTS, {"format": "mlx"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=4), encoding="utf-8")


def _write_diffusers(lora: Lora, folder: Path) -> None:
    """The one file that a pipeline's load_lora_weights takes, its names starting with the pipeline's component."""
    if lora.family.base.library != "diffusers":
        raise ValueError(
            "format='diffusers' is for models of diffusers, but the base model is a "
            f"{lora.family.base.kind}. Choose another format."
        )
    _check_modules(lora, "diffusers", "linear layers and convolutions", _is_in_pipeline)
    component = "unet" if "UNet" in lora.family.base.kind else "transformer"
    # diffusers hands all of these to LoraConfig, where an older PEFT refuses a field that it does not know.
    config = lora.family.config()
    fields = {name: getattr(config, name) for name in ("r", "lora_alpha", "bias", "target_modules")}
    metadata = {f"{component}.{name}": value for name, value in fields.items()}
    write_tensors(
        lora.named_factors(f"{component}."),
        folder / _DIFFUSERS_WEIGHTS,
        {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2)},
    )


# Each writes into an empty folder.
FORMATS: dict[str, Callable[[Lora, Path], None]] = {
    "peft": _write_peft,
    "gguf-ready": _write_gguf_ready,
    "mlx": _write_mlx,
    "diffusers": _write_diffusers,
}

_PEFT = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# What nobody can load a LoRA without.
_FILES = {
    "peft": _PEFT,
    "gguf-ready": (*_PEFT, BASE_CONFIG),
    "mlx": (CONFIG_NAME, _MLX_WEIGHTS),
    "diffusers": (_DIFFUSERS_WEIGHTS,),
}


def is_whole(folder: Path, format: str = "peft") -> bool:
    """Whether a folder holds a LoRA, from which no cleaner of temporary files has taken anything."""
    return all((folder / name).is_file() for name in _FILES[format])


def _check_modules(lora: Lora, format: str, taken: str, takes: Callable[[Position], bool]) -> None:
    """Refuse modules that a format has no place for."""
    others = [path for path in lora.factors if not takes(lora.family.positions[path])]
    if others:
        raise ValueError(
            f"format={format!r} takes {taken}, but the adapter also adapts {shown(others)}. Export with "
            "format='peft', or train with these in exclude_modules."
        )
    modules = {name.removeprefix(_PREFIX).rpartition(".")[0] for name in lora.family.saved}
    # Beside them PEFT saves what an adapted embedding held before, which the base model has.
    trained = sorted(module for module in modules if not module.endswith(".base_layer"))
    if trained:
        raise ValueError(
            f"format={format!r} has no place for modules trained in full, but modules_to_save has {shown(trained)}. "
            "Export with format='peft', or train without them."
        )


def _is_linear(position: Position) -> bool:
    return position.kind == "Linear"


def _is_in_decoder_layer(position: Position) -> bool:
    return position.kind in ("Linear", "Conv1D") and _DECODER_LAYER.fullmatch(position.name) is not None


def _is_in_pipeline(position: Position) -> bool:
    return position.kind not in ("Embedding", "Experts")
