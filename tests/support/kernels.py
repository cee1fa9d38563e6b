"""Where kernels are tested: on a GPU or, in a process with TRITON_INTERPRET=1, on the CPU by Triton's interpreter."""

import os
import subprocess
import sys

import pytest
from torch import Tensor

from hyperadapt.normalization import cores, gram

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACE = "cpu" if INTERPRETED else "cuda"
NEEDS_KERNELS = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu


def run_interpreted(file: str, names: str, outcome: str) -> None:
    """Run tests of a file in a process of their own: Triton reads the setting when it is imported."""
    # An older interpreter does not know what the kernels use.
    pytest.importorskip("triton", minversion="3.9")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", names]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert outcome in result.stdout


def let_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take kernels also for float32 tensors that are not on a GPU."""

    def serve(tensor: Tensor) -> bool:
        return tensor.dtype in gram.KERNEL_DTYPES and tensor.shape[-2] <= gram.LARGEST_KERNEL_RANK

    for module in (gram, cores):
        monkeypatch.setattr(module, "kernels_serve", serve)
