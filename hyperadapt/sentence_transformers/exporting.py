"""One task of an embedding model, for those who do not have hyperadapt."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from hyperadapt.files import whole_folder
from hyperadapt.loras.folders import check_places, write_lora
from hyperadapt.loras.generator import LoraGenerator, loras_of
from hyperadapt.loras.lora import Lora, warn_of_mistakes, warn_of_zeros
from hyperadapt.sentence_transformers.transformer import HyperAdapterTransformer


class _ExportedTask(nn.Module):
    """Stands for the model while a ``Transformer`` is saved to a place whose files are moved into `folder`."""

    def __init__(self, lora: Lora, folder: Path) -> None:
        super().__init__()
        self.lora, self.folder = lora, folder

    def save_pretrained(self, place: str, **kwargs: object) -> None:
        write_lora(self.lora, Path(place), self.folder, "peft")


def export_sentence_transformer(  # noqa: DOC502, DOC503
    model: SentenceTransformer, task: str, folder: str | os.PathLike[str]
) -> None:
    """Write one task as a folder that ``SentenceTransformer`` loads without hyperadapt: a LoRA and the other modules.

    The LoRA alone is what ``export_lora(model.transformers_model, task, folder)`` writes, for ``model.load_adapter``.

    Args:
        model: A ``SentenceTransformer`` with a hyperadapter.
        task: Name of the task.
        folder: Folder to write to; made if missing, other files in it are left alone. All files appear complete or not
            at all.

    Raises:
        TypeError: If the model has no hyperadapter.
        ValueError: If the task is unknown, several adapters are active, or `folder` is a file or holds a hyperadapter.
    """
    module = model[0]
    if not isinstance(module, HyperAdapterTransformer):
        raise TypeError(
            f"The model's first module is a {type(module).__name__}, without a hyperadapter, so that there is no task "
            "to export. Call add_hyperadapter, or load a model that was saved with one."
        )
    check_places([Path(folder)], "peft")
    [lora] = loras_of(LoraGenerator.from_model(module.model), [task])
    plain = Transformer.__new__(Transformer)
    vars(plain).update(vars(module))
    plain._modules = {**module._modules, "model": _ExportedTask(lora, Path(folder))}
    exported = copy.copy(model)
    exported._modules = {**model._modules, "0": plain}
    with whole_folder(folder) as new:
        exported.save(str(new), create_model_card=False)
    warn_of_zeros([lora.task] if lora.is_zero else [])
    warn_of_mistakes([lora.family], "peft")
