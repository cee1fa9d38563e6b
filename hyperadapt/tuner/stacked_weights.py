"""A stack of weights with low-rank updates, which functions of torch take for the sum without its being formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

_MATMULS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
# The name has changed, and transformers has a function of its own where torch's serves no other dtype or device.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_OF_WEIGHT = ("shape", "dtype", "device", "ndim", "size", "dim", "data_ptr", "is_cuda", "layout", "requires_grad")


class StackedWeights:
    """``weight + left·right`` for a weight ``(..., m, n)``, left ``(..., m, r)`` and right ``(..., r, n)``.

    Experts take one of a stack, transpose it, or multiply by it: then the product with the update goes through the
    rank. Whatever else a function does gets the sum, of as much of the stack as was taken.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right
        # Indexing would make a gradient of the size of the whole stack for each expert.
        self._each = list(zip(left.unbind(0), right.unbind(0), strict=True)) if weight.ndim == 3 else []

    def dense(self) -> Tensor:
        """The sum, as PEFT's LoRA makes it."""
        if self.weight.ndim == 2:
            return torch.addmm(self.weight, self.left, self.right)
        return torch.baddbmm(self.weight, self.left, self.right)

    def __getitem__(self, index: Any) -> StackedWeights:
        if isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim):
            return StackedWeights(self.weight[index], *self._each[int(index)])
        return StackedWeights(*(part[index] for part in (self.weight, self.left, self.right)))

    def transpose(self, first: int, second: int) -> Any:
        """The same, transposed, if it is a stack of matrices still."""
        if {first % self.weight.ndim, second % self.weight.ndim} != {self.weight.ndim - 2, self.weight.ndim - 1}:
            return self.dense().transpose(first, second)
        return StackedWeights(self.weight.mT, self.right.mT, self.left.mT)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.weight if name in _OF_WEIGHT else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        is_grouped = getattr(function, "__name__", "") in _GROUPED
        match args:
            case (Tensor() as x, StackedWeights() as one, *others) if function is linear:
                return linear(x, one.weight, *others, **options) + linear(linear(x, one.right), one.left)
            case (Tensor() as x, StackedWeights() as one, *others) if is_grouped or function in _MATMULS:
                left, right = one._aligned() if is_grouped else (one.left, one.right)
                update = function(function(x, left, *others, **options), right, *others, **options)
                return function(x, one.weight, *others, **options) + update
            case (StackedWeights() as one, Tensor() as x) if function in _MATMULS:
                return function(one.weight, x) + function(one.left, function(one.right, x))
        return function(*map(_formed, args), **{name: _formed(value) for name, value in options.items()})

    def _aligned(self) -> tuple[Tensor, Tensor]:
        """Both parts as grouped products ask for: the rank fills whole 16 bytes, by zeros, and lies together."""
        missing = -self.left.shape[-1] % (16 // self.left.itemsize)
        left, right = (pad(part, (0, missing)).contiguous() for part in (self.left, self.right.mT))
        return left, right.mT


def _formed(value: Any) -> Any:
    return value.dense() if isinstance(value, StackedWeights) else value
