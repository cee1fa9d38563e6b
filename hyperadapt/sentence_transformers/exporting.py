"""One task of an embedding model, for those who do not have hyperadapt."""

from __future__ import annotations

import copy
import os

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from hyperadapt.files import whole_folder
from hyperadapt.loras.export import export_lora
from hyperadapt.sentence_transformers.transformer import HyperAdapterTransformer


class _ExportedTask(nn.Module):
    """Stands for the model while a ``Transformer`` is saved."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.adapted, self.task = [model], task

    def save_pretrained(self, folder: str, **kwargs: object) -> None:
        export_lora(self.adapted[0], self.task, folder)


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
        ValueError: If the task is unknown, or several adapters are active.
    """
    module = model[0]
    if not isinstance(module, HyperAdapterTransformer):
        raise TypeError(
            f"The model's first module is a {type(module).__name__}, without a hyperadapter, so that there is no task "
            "to export. Call add_hyperadapter, or load a model that was saved with one."
        )
    plain = Transformer.__new__(Transformer)
    vars(plain).update(vars(module))
    plain._modules = {**module._modules, "model": _ExportedTask(module.model, task)}
    exported = copy.copy(model)
    exported._modules = {**model._modules, "0": plain}
    with whole_folder(folder) as new:
        exported.save(str(new), create_model_card=False)
