"""Export of tasks, or of a description, as ordinary LoRA folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapt.cards.card import may_be_written_anew
from hyperadapt.cards.lora_card import write_lora_card
from hyperadapt.config.checks import check_choice, checked_names, shown
from hyperadapt.config.task_fields import descriptions_of
from hyperadapt.files import whole_folders
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.loras.file_formats import FORMATS
from hyperadapt.loras.lora import Lora, padded, uniform_rank
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.active import active_network, find_tuner
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.model import HyperAdapterModel

# The network is called for so many tasks at once; the factors of that many are in memory.
_TASKS_AT_ONCE = 16
# Folders of these names, also with an ending, cannot be made on Windows.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{digit}" for name in ("com", "lpt") for digit in range(10))}


@dataclass(frozen=True)
class _Export:
    """A folder to write, and what its card tells of the task."""

    folder: Path
    task: str | None
    descriptions: list[str]


def export_lora(  # noqa: DOC502
    model: nn.Module, task: str, directory: str | os.PathLike[str], *, format: str = "peft"
) -> None:
    """Write one task of the active adapter as a LoRA folder, which needs no hyperadapt to be loaded.

    Writes A and B·S, so nothing is approximated; the scaling is inside, with ``lora_alpha == r``. The rank is the same
    everywhere, and one that every server takes: 8, 16, 32, 64, 128 or 256, with zeros added, or the adapter's own if it
    is higher. A model card, README.md, is added if there is none. All files appear complete or not at all. A model that
    is sharded over processes must be exported by all of them, to a folder each.

    Formats:
        - ``"peft"``: for PEFT, vLLM, SGLang and other servers. Modules trained in full (``modules_to_save``) are
          included.
        - ``"gguf-ready"``: the same, for llama.cpp's ``convert_lora_to_gguf.py``, with the base model's
          ``config.json``; linear layers only.
        - ``"mlx"``: for mlx-lm (``adapters.safetensors``); linear layers of a decoder's layers only.
        - ``"diffusers"``: for ``load_lora_weights`` of a pipeline (``pytorch_lora_weights.safetensors``), if the base
          model is a model of diffusers.

    Args:
        model: A ``PeftModel`` with a hyperadapter.
        task: Name of the task.
        directory: Folder to write to; made if missing, other files in it are left alone.
        format: One of the above.

    Raises:
        ValueError: If the task or the format is unknown, the format has no place for a module, several adapters are
            active, `directory` is a file, or parameters are partitioned by DeepSpeed's ZeRO-3 and not gathered.
    """
    config = active_network(model)[1].config
    tasks = resolve_task_ids([task], config.task_names)
    _write(model, tasks, [_Export(Path(directory), task, descriptions_of(config.task_descriptions, task))], format)


def export_loras(  # noqa: DOC502
    model: nn.Module,
    directory: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
    *,
    format: str = "peft",
) -> dict[str, Path]:
    """Write several tasks of the active adapter as LoRA folders, one for each task; all of them, or none.

    Args:
        model: A ``PeftModel`` with a hyperadapter.
        directory: Folder that gets a folder for each task, named after it; made if missing.
        tasks: Names of the tasks; None for all.
        format: As in ``export_lora``.

    Returns:
        The folders by task.

    Raises:
        TypeError: If `tasks` is no list of names.
        ValueError: As in ``export_lora``; or if a task's name is no safe name of a folder, or two are the same to a
            file system that ignores case.
    """
    config = active_network(model)[1].config
    names = config.task_names if tasks is None else checked_names("tasks", tasks)
    task_ids = resolve_task_ids(names, config.task_names)
    _check_folder_names(names)
    exports = [_Export(Path(directory, name), name, descriptions_of(config.task_descriptions, name)) for name in names]
    _write(model, task_ids, exports, format)
    return {name: export.folder for name, export in zip(names, exports, strict=True)}


def generate_lora(  # noqa: DOC502
    model: nn.Module,
    description: str | Sequence[str],
    directory: str | os.PathLike[str],
    *,
    text_encoder: str | Callable[[list[str]], Tensor] | None = None,
    format: str = "peft",
) -> None:
    """Write the adapter that a description asks for as a LoRA folder; the model stays as it is.

    Args:
        model: A ``PeftModel`` with a hyperadapter that was trained with descriptions.
        description: A text that describes the task, or several.
        directory: As in ``export_lora``.
        text_encoder: The encoder that the adapter was made with, where its name does not find it (a function, or a
            folder that has moved).
        format: As in ``export_lora``.

    Raises:
        ValueError: If the adapter knows no text, the description is empty, the encoder is another one, the format is
            unknown or has no place for a module, several adapters are active, or `directory` is a file.
    """
    embedding = find_tuner(model).embed_description(description, text_encoder=text_encoder)
    descriptions = [description] if isinstance(description, str) else list(description)
    _write(model, embedding[None], [_Export(Path(directory), None, descriptions)], format)


def _check_folder_names(names: Sequence[str]) -> None:
    """Refuse what is no name of a folder on some file system, or means another folder."""
    seen: dict[str, str] = {}
    for name in names:
        is_plain = re.fullmatch(r"[^\x00-\x1f<>:\"/\\|?*]+", name) and name == name.strip() == name.strip(".")
        if not is_plain or len(name.encode()) > 255 or name.partition(".")[0].lower() in _RESERVED:
            raise ValueError(
                f"Task {shown(name)} cannot be the name of a folder: slashes and the like, control characters, spaces "
                "or dots at an end, more than 255 bytes, and names that Windows reserves are refused. Call "
                "rename_task, or export it with export_lora."
            )
        if name.casefold() in seen:
            raise ValueError(
                f"Tasks {shown(seen[name.casefold()])} and {shown(name)} would share a folder where case is ignored. "
                "Name every task once, call rename_task, or export them one by one with export_lora."
            )
        seen[name.casefold()] = name


def _write(model: nn.Module, tasks: Tensor, exports: Sequence[_Export], format: str) -> None:
    """Write adapters of tasks, given by id, shape (n,), or embedding, shape (n, task_embedding_dim), or nothing."""
    check_choice("format", format, tuple(FORMATS))
    for export in exports:
        if export.folder.is_file():
            raise ValueError(f"directory={str(export.folder)!r} is a file; pass a folder.")
    with whole_folders([export.folder for export in exports]) as folders:
        for folder, export, lora in zip(folders, exports, _loras(model, tasks), strict=True):
            FORMATS[format](lora, folder)
            if may_be_written_anew(export.folder):
                address = str(export.folder)
                write_lora_card(model, export.task, export.descriptions, folder, format=format, address=address)


def _loras(model: nn.Module, tasks: Tensor) -> Iterator[Lora]:
    """The LoRAs of tasks, in their order."""
    tuner = find_tuner(model)
    adapter_name, network = active_network(model)
    layers = _layers(tuner, adapter_name)
    config = _lora_config(tuner, adapter_name)
    saved = _fully_trained_state_dict(model, adapter_name)
    network = whole_network(network)
    for chunk in torch.split(tasks, _TASKS_AT_ONCE):
        with torch.no_grad():
            generated = network(chunk)
        for index in range(len(chunk)):
            factors = {
                path: padded(layers[path].lora_tensors(Factors(*(part[index : index + 1] for part in one))), config.r)
                for path, one in generated.items()
            }
            yield Lora(tuner.model, config, factors, saved)


def _fully_trained_state_dict(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    prefix = f"base_model.{HyperAdapterModel.prefix}"
    return {key: value.cpu().contiguous() for key, value in state_dict.items() if not key.startswith(prefix)}


def _lora_config(tuner: HyperAdapterModel, adapter_name: str) -> LoraConfig:
    config = tuner.router.network(adapter_name).config
    layers = _layers(tuner, adapter_name)
    r = uniform_rank(layer.hyperadapter_position[adapter_name].r for layer in layers.values())
    return LoraConfig(
        r=r,
        # The scaling is in the factors.
        lora_alpha=r,
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
