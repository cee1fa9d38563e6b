"""hyperadapt: a hypernetwork that generates matrix-normalised LoRA adapters, as a PEFT method."""

from contextlib import suppress as _suppress
from importlib import import_module as _import_module
from typing import Any as _Any

from hyperadapt import nn
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.diagnosis import Diagnosis, diagnose
from hyperadapt.hub.push import push
from hyperadapt.listening import Control, Controls, controls
from hyperadapt.loras.distillation import Distillation, distill
from hyperadapt.loras.export import export_lora, export_loras, generate_lora
from hyperadapt.loras.generator import LoraGenerator
from hyperadapt.normalization.normalize import normalize
from hyperadapt.plugin import register as _register
from hyperadapt.tuner.active import use_tasks
from hyperadapt.tuner.model import HyperAdapterModel
from hyperadapt.when_imported import when_imported as _when_imported

__version__ = "0.1.0"
__all__ = [
    "Control",
    "Controls",
    "Diagnosis",
    "Distillation",
    "HyperAdapterConfig",
    "HyperAdapterModel",
    "LoraGenerator",
    "controls",
    "diagnose",
    "distill",
    "export_lora",
    "export_loras",
    "generate_lora",
    "nn",
    "normalize",
    "push",
    "use_tasks",
]

_register()
# They take time or optional packages to import.
_LAZY = ("cards", "plots", "recipes", "runs", "sentence_transformers", "serving", "trainer", "trl")


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _import_module(f"hyperadapt.{name}")
    raise AttributeError(f"module 'hyperadapt' has no attribute {name!r}")


def _let_folders_be_loaded() -> None:
    """Have sentence-transformers know the module that saved embedding models name; older releases cannot."""
    with _suppress(ImportError):
        _import_module("hyperadapt.sentence_transformers")


_when_imported("sentence_transformers", _let_folders_be_loaded)
