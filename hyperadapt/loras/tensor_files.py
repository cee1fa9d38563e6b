"""Many files of tensors in safetensors, whose names, shapes and dtypes are the same: their headers are made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_LENGTH = 8


class TensorFiles:
    """Writes files of tensors with the same metadata; the bytes are those of ``safetensors.torch.save_file``."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.metadata = metadata
        self._kind: list[tuple[str, torch.Size, torch.dtype]] = []
        self._header, self._order = b"", [""]

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write a file; tensors are contiguous, on the CPU, and share no memory."""
        kind = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if kind != self._kind or sys.byteorder != "little":
            save_file(dict(tensors), path, metadata=self.metadata)
            self._kind = kind
            self._header, self._order = _read_header(path)
            return
        parts = [tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in self._order]
        path.write_bytes(b"".join([self._header, *parts]))


def _read_header(path: Path) -> tuple[bytes, list[str]]:
    """The header of a file, with its length before it, and the tensors' names in the order of their bytes."""
    with path.open("rb") as file:
        length = file.read(_LENGTH)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return length + header, sorted(entries, key=lambda name: entries[name]["data_offsets"])
