"""Export of tasks, or of a description, as ordinary LoRA folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from hyperadapt.config.checks import checked_names
from hyperadapt.loras.folders import check_folder_names, write_loras
from hyperadapt.loras.generator import LoraGenerator, loras_of


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
    LoraGenerator.from_model(model).save(task, directory, format=format)


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
    generator = LoraGenerator.from_model(model)
    names = generator.tasks if tasks is None else checked_names("tasks", tasks)
    loras = loras_of(generator, names)
    check_folder_names(names)
    folders = {name: Path(directory, name) for name in names}
    write_loras(loras, list(folders.values()), format)
    return folders


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
    lora = LoraGenerator.from_model(model).from_description(description, text_encoder=text_encoder)
    lora.save(directory, format=format)
