"""Many files of tensors in safetensors, whose names, shapes and dtypes are the same: their headers are made once."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_LENGTH = 8
# Of small tensors each would be a call of the operating system.
_BUFFER = 2**22


class _Layout(NamedTuple):
    """Names, shapes and dtypes of tensors, the header of their file, and their names in the order of their bytes."""

    kind: list[tuple[str, torch.Size, torch.dtype]]
    header: bytes
    order: list[str]


class TensorFiles:
    """Writes files of tensors with the same metadata; the bytes are those of ``safetensors.torch.save_file``."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.metadata = metadata
        self._last: _Layout | None = None

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write a file; tensors are contiguous, on the CPU, and share no memory."""
        kind = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        # Read once, as other threads may write files, too.
        last = self._last
        if last is None or kind != last.kind or sys.byteorder != "little":
            write_tensors(tensors, path, self.metadata)
            self._last = _Layout(kind, *_read_header(path))
            return
        parts = [_content(tensors[name]) for name in last.order]
        with path.open("wb", buffering=_BUFFER) as file:
            file.writelines([last.header, *parts])


def _content(tensor: Tensor) -> Any:
    """What a file takes the bytes of; NumPy does not know all dtypes."""
    return (tensor if tensor.dtype == torch.float32 else tensor.reshape(-1).view(torch.uint8)).numpy()


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``save_file``, whose errors of the disk are those of Python."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _read_header(path: Path) -> tuple[bytes, list[str]]:
    """The header of a file, with its length before it, and the tensors' names in the order of their bytes."""
    with path.open("rb") as file:
        length = file.read(_LENGTH)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return length + header, sorted(entries, key=lambda name: entries[name]["data_offsets"])
