"""What an installation has, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

import torch
from huggingface_hub import constants, get_token

_REQUIRED = ("hyperadapt", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
# Package -> what is missing without it, and what installs it.
_OPTIONAL = {
    "sentence-transformers": ("text encoders given by name", 'pip install "hyperadapt[text]"'),
    "matplotlib": ("pictures", 'pip install "hyperadapt[plot]"'),
    "triton": ("the GPU kernel", 'pip install "hyperadapt[triton]"'),
    "trl": ("training with SFTTrainer", "pip install trl"),
    "bitsandbytes": ("8 and 4 bit base models", "pip install bitsandbytes"),
    "torchao": ("base models quantised by torchao", "pip install torchao"),
    "deepspeed": ("ZeRO", "pip install deepspeed"),
}


def report() -> dict[str, Any]:
    """Versions, devices, kernels, Hub, and what is missing; nothing is loaded and the network is not used."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    missing = {
        name: {"without": without, "remedy": remedy}
        for name, (without, remedy) in _OPTIONAL.items()
        if versions[name] is None
    }
    return {
        "versions": versions,
        "devices": _devices(),
        "kernels": _kernels(),
        "hub": {
            "endpoint": constants.ENDPOINT,
            "token": get_token() is not None,
            "offline": constants.is_offline_mode(),
        },
        "missing": missing,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = round(properties.total_memory / 2**30, 1)
        devices.append({"device": f"cuda:{index}", "name": properties.name, "memory_GiB": gigabytes})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.processor()})
    return devices


def _kernels() -> dict[str, str]:
    if os.environ.get("HYPERADAPT_KERNELS") == "reference":
        return {"used": "torch", "reason": "HYPERADAPT_KERNELS=reference is set"}
    if not torch.cuda.is_available():
        return {"used": "torch", "reason": "no CUDA device"}
    if importlib.util.find_spec("triton") is None:
        return {"used": "torch", "reason": 'Triton is not installed: pip install "hyperadapt[triton]"'}
    return {"used": "triton", "reason": "a CUDA device and Triton are there"}
