"""Generated factors of one position, and how they act on activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, linear, pad

from hyperadapt.normalization.precision import own_dtype

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Factors(NamedTuple):
    """A normalised update B·S·A of one position, for several tasks.

    A tuple, in which sharded training finds the tensors whose gradients it waits for. Those of fused experts have a
    dimension of experts after that of the tasks.

    Args:
        lora_A: Shape ``(tasks, r, in_features)``.
        lora_B: Shape ``(tasks, out_features, r)``.
        core: The matrix S, shape ``(tasks, r, r)``, or ``(tasks, 1, 1)`` where it is a multiple of the identity; holds
            the normalisation, gain and scaling, as far as B does not. In the network's dtype, also where autocast lets
            A and B be in half precision.
    """

    lora_A: Tensor
    lora_B: Tensor
    core: Tensor

    def of_weights(self) -> list[Factors]:
        """The factors of each expert; these themselves, where there is one weight."""
        if self.lora_A.ndim == 3:
            return [self]
        return [Factors(*parts) for parts in zip(*(tensor.unbind(1) for tensor in self), strict=True)]

    def to(self, device: torch.device) -> Factors:
        """The factors on a device, sharing what is there already."""
        return Factors(*(tensor.to(device) for tensor in self))

    def apply(self, x: Tensor, rows: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """``x·(B·S·A)ᵀ``, shape ``(..., out_features)``, through the rank-r activation; B·S·A is never formed.

        ``rows`` is the task of each element of the first dimension of ``x``, int64; None if there is one task, or one
        for each element, in order. The result is added to ``onto``, which stays as it is.
        """
        if rows is None and self.lora_A.shape[0] == 1:
            # An index would make a gradient of zeros to copy into.
            return self._expand(linear(x, self.lora_A.squeeze(0)), onto)
        inputs = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        factors = self._of(rows)
        shape = *x.shape[:-1], self.lora_B.shape[-2]
        if onto is not None:
            onto = onto.reshape(*inputs.shape[:-1], shape[-1])
        return factors._expand(inputs @ factors.lora_A.mT, onto).reshape(shape)

    def embed(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Rows of ``(B·S·A)ᵀ`` for ids ``(batch, ...)``, shape ``(batch, ..., out_features)``; rows as in ``apply``."""
        if rows is None and self.lora_A.shape[0] == 1:
            return self._expand(nn.functional.embedding(ids, self.lora_A.squeeze(0).T))
        per_row = ids.reshape(ids.shape[0], -1)
        tasks = torch.arange(ids.shape[0], device=ids.device) if rows is None else rows
        hidden = self.lora_A.mT[tasks[:, None], per_row]
        return self._of(rows)._expand(hidden).reshape(*ids.shape, self.lora_B.shape[-2])

    def convolve(self, x: Tensor, rows: Tensor | None, convolution: Convolution) -> Tensor:
        """Convolve x ``(batch, channels, ...)`` with B·S·A, whose columns are channels and kernel, flattened.

        With one task the batch may be missing. The convolution gives stride, padding, dilation and the size of the
        kernel; its groups must be 1.
        """
        kernel = (-1, *convolution.weight.shape[1:])
        channels = -len(convolution.kernel_size) - 1
        if rows is None and self.lora_A.shape[0] == 1:
            hidden = _convolve(x, self.lora_A.squeeze(0).reshape(kernel), convolution, groups=1)
            return self._expand(hidden.movedim(channels, -1)).movedim(-1, channels)
        # Each row's own kernel: the rows become groups of one convolution.
        factors = self._of(rows)
        kernels = factors.lora_A.reshape(kernel)
        hidden = _convolve(x.reshape(1, -1, *x.shape[2:]), kernels, convolution, groups=x.shape[0])
        hidden = hidden.reshape(x.shape[0], -1, *hidden.shape[2:]).movedim(channels, -1)
        update = factors._expand(hidden.flatten(1, -2))
        return update.reshape(*hidden.shape[:-1], update.shape[-1]).movedim(-1, channels)

    def delta_weight(self) -> Tensor:
        """The dense update B·S·A of every task, shape ``(tasks, out_features, in_features)``, also under autocast."""
        with own_dtype(self.lora_A.device):
            return self.outer() @ self.lora_A

    def outer(self) -> Tensor:
        """The product B·S, shape ``(tasks, out_features, r)``: what B is in a LoRA whose scaling is 1."""
        return times_core(self.lora_B, self.core)

    def _of(self, rows: Tensor | None) -> Factors:
        """The factors of each row."""
        return self if rows is None else Factors(*(tensor[rows] for tensor in self))

    def _expand(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """From the rank-r activation to the output: any shape with one task, ``(tasks, n, r)`` with several."""
        is_single = self.lora_A.shape[0] == 1
        core, lora_B = (self.core.squeeze(0), self.lora_B.squeeze(0)) if is_single else (self.core, self.lora_B)
        hidden = times_core(hidden, core.mT)
        if onto is None or onto.dtype != hidden.dtype:
            update = linear(hidden, lora_B) if is_single else hidden @ lora_B.mT
            return update if onto is None else onto + update
        # One pass over the output instead of two.
        if is_single:
            rows = onto.reshape(-1, onto.shape[-1])
            return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), lora_B.T).reshape(onto.shape)
        return torch.baddbmm(onto, hidden, lora_B.mT)


def without_column(columns: Tensor, index: int | None) -> Tensor:
    """Zeros in a column of ``(rows, columns)``: an embedding's padding index, which keeps its embedding."""
    return columns if index is None else columns.index_fill(1, torch.tensor(index, device=columns.device), 0)


def times_core(x: Tensor, core: Tensor) -> Tensor:
    """x·S for x ``(..., n, r)`` or ``(r,)``, and S ``(..., r, r)`` or ``(..., 1, 1)``, in the dtype of x."""
    if core.shape[-1] > 1:
        return x @ core.to(x.dtype)
    # The scalar's own dimensions would add to those of a vector. In half precision, x is multiplied by its exact value.
    return (x * (core if x.ndim > 1 else core[..., 0])).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, convolution: Convolution, *, groups: int) -> Tensor:
    function: Any = {3: conv1d, 4: conv2d, 5: conv3d}[weight.ndim]
    padding = convolution.padding
    if convolution.padding_mode != "zeros":
        x = pad(x, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
        padding = (0,) * len(convolution.kernel_size)
    result: Tensor = function(x, weight, None, convolution.stride, padding, convolution.dilation, groups)
    return result
