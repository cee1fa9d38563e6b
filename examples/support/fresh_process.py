"""Checks that what was saved predicts the same in a process that knows nothing but the files."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.support.data import TextData

# Logits are of size 10, and float32 rounds A and B·S in another order than A, S and B.
EXPORT_TOLERANCE = 1e-4


def check_reloaded(folder: Path, data: TextData, logits: Mapping[str, Tensor]) -> None:
    """Load a saved hyperadapter, and raise unless its test logits are the same to the last bit."""
    if not torch.equal(_predict(folder, data, "--plugin"), torch.cat(list(logits.values()))):
        raise RuntimeError("The reloaded hyperadapter predicts differently.")
    print(f"saved to {folder}, reloaded in a fresh process: predictions identical", flush=True)


def check_exported(folder: Path, task: str, data: TextData, logits: Tensor) -> None:
    """Load an exported LoRA with plain PEFT, and raise unless its test logits are the same but for rounding."""
    difference = (_predict(folder, data, "--only", task) - logits).abs().max().item()
    if difference > EXPORT_TOLERANCE:
        raise RuntimeError(f"The exported LoRA predicts differently: its logits are off by {difference:.1e}.")
    print(f"exported {task} to {folder}, loaded by plain peft: logits differ by {difference:.1e}")


def _predict(folder: Path, data: TextData, *arguments: str) -> Tensor:
    """Test logits from another process, shape (rows, classes)."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "logits.safetensors")
        command = [sys.executable, "-m", "examples.support.predict", str(folder), str(output)]
        command += ["--tasks", *data.descriptions, "--rows", str(data.rows["test"])]
        command += ["--max-length", str(data.max_length), *arguments]
        subprocess.run(command, check=True)
        return load_file(output)["logits"]
