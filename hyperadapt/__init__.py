"""hyperadapt: a hypernetwork that generates matrix-normalised LoRA adapters, as a PEFT method."""

from hyperadapt import nn
from hyperadapt.config import HyperAdapterConfig
from hyperadapt.diagnosis import Diagnosis, diagnose
from hyperadapt.distillation import Distillation, distill
from hyperadapt.export import export_lora, export_loras, generate_lora
from hyperadapt.hub import push
from hyperadapt.model import HyperAdapterModel, use_tasks
from hyperadapt.normalization import normalize
from hyperadapt.registration import register as _register

__version__ = "0.1.0"
__all__ = [
    "Diagnosis",
    "Distillation",
    "HyperAdapterConfig",
    "HyperAdapterModel",
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
