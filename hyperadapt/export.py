"""Export of one task, or of a description, as an ordinary PEFT LoRA folder."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapt.layer import HyperAdapterLayer
from hyperadapt.model import HyperAdapterModel, find_tuner
from hyperadapt.sharding import whole_network
from hyperadapt.tasks import resolve_task_ids


def export_lora(model: nn.Module, task: str, directory: str | os.PathLike[str]) -> None:  # noqa: DOC502
    """Write one task of the active adapter as a LoRA folder that plain PEFT loads, at exactly rank r.

    Writes A and B·S, so nothing is approximated; the scaling is inside, with ``lora_alpha == r``. Modules
    trained in full (``modules_to_save``) are included. The two files appear complete or not at all. A model that is
    sharded over processes must be exported by all of them, to a folder each.

    Args:
        model: A ``PeftModel`` with a hyperadapter.
        task: Name of the task.
        directory: Folder to write to; made if missing, other files in it are left alone.

    Raises:
        ValueError: If the task is unknown, several adapters are active, `directory` is a file, or parameters are
            partitioned by DeepSpeed's ZeRO-3 and not gathered.
    """
    tuner = find_tuner(model)
    network = tuner.router.network(_exported_adapter(tuner))
    _write_lora(model, resolve_task_ids([task], network.config.task_names), directory)


def generate_lora(  # noqa: DOC502
    model: nn.Module,
    description: str | Sequence[str],
    directory: str | os.PathLike[str],
    *,
    text_encoder: str | Callable[[list[str]], Tensor] | None = None,
) -> None:
    """Write the adapter that a description asks for as a LoRA folder that plain PEFT loads; the model stays as it is.

    Args:
        model: A ``PeftModel`` with a hyperadapter that was trained with descriptions.
        description: A text that describes the task, or several.
        directory: As in ``export_lora``.
        text_encoder: The encoder that the adapter was made with, where its name does not find it (a function, or a
            folder that has moved).

    Raises:
        ValueError: If the adapter knows no text, the description is empty, the encoder is another one, several adapters
            are active, or `directory` is a file.
    """
    embedding = find_tuner(model).embed_description(description, text_encoder=text_encoder)
    _write_lora(model, embedding[None], directory)


def _exported_adapter(tuner: HyperAdapterModel) -> str:
    if len(tuner.active_adapters) != 1:
        raise ValueError(
            f"Only one adapter is exported, but {tuner.active_adapters} are active. Set one with set_adapter."
        )
    return tuner.active_adapters[0]


def _write_lora(model: nn.Module, tasks: Tensor, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of one task, given by id, shape (1,), or embedding, shape (1, task_embedding_dim)."""
    tuner = find_tuner(model)
    adapter_name = _exported_adapter(tuner)
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(f"directory={str(directory)!r} is a file; pass a folder.")
    state_dict = _lora_state_dict(tuner, adapter_name, tasks)
    state_dict.update(_fully_trained_state_dict(model, adapter_name))
    config = _lora_config(tuner, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        save_file(state_dict, Path(temporary, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(temporary)
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(temporary, name), folder / name)


@torch.no_grad()
def _lora_state_dict(tuner: HyperAdapterModel, adapter_name: str, tasks: Tensor) -> dict[str, Tensor]:
    layers = _layers(tuner, adapter_name)
    network = tuner.router.network(adapter_name)
    return {
        f"base_model.model.{position}.{name}": tensor.cpu().contiguous()
        for position, factors in whole_network(network)(tasks).items()
        for name, tensor in layers[position].lora_tensors(factors).items()
    }


def _fully_trained_state_dict(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    prefix = f"base_model.{HyperAdapterModel.prefix}"
    return {key: value.cpu().contiguous() for key, value in state_dict.items() if not key.startswith(prefix)}


def _lora_config(tuner: HyperAdapterModel, adapter_name: str) -> LoraConfig:
    config = tuner.router.network(adapter_name).config
    layers = _layers(tuner, adapter_name)
    ranks = {name: layer.hyperadapter_position[adapter_name].r for name, layer in layers.items()}
    # The scaling is in the factors, so alpha is the rank everywhere.
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != config.r}
    return LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_target_modules(tuner.model, list(layers)),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _layers(tuner: HyperAdapterModel, adapter_name: str) -> dict[str, HyperAdapterLayer]:
    return {
        layer.hyperadapter_position[adapter_name].name: layer
        for layer in tuner.modules()
        if isinstance(layer, HyperAdapterLayer) and adapter_name in layer.hyperadapter_position
    }


def _target_modules(base_model: nn.Module, names: list[str]) -> list[str]:
    """Last components of the names if they match nothing else (what servers expect), else the full names."""
    endings = {name.rpartition(".")[2] for name in names}
    matched = {
        name.removesuffix(".base_layer")
        for name, _ in base_model.named_modules()
        if name.removesuffix(".base_layer").rpartition(".")[2] in endings
    }
    return sorted(endings) if matched == set(names) else sorted(names)
