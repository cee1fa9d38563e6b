"""Numbers that the host knows, as tensors on a device: made once, so that no step copies them there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Tables:
    """The tables of one module, by numbers, device and dtype.

    None is forgotten, since a CUDA graph that reads one may be replayed at any time; of each set of positions there are
    few. A copy of the module makes its own.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def table(self, numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """The numbers on a device, which is waited for the first time only; nothing may be written to them."""
        key = tuple(numbers), device, dtype
        # An exported program has its own. A compiled graph takes those that are there, and makes others each time.
        if key in self._made and not torch.compiler.is_exporting():
            return self._made[key]
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)
        # A tensor of inference mode could not be used in training.
        with torch.inference_mode(False):
            table = torch.tensor(numbers, dtype=dtype, device="cpu").to(device)
        # Those of torch's modes without data are of no use outside of them.
        if type(table) is Tensor:
            self._made[key] = table
        return table
