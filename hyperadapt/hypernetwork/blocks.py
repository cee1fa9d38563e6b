"""What a hypernetwork is made of: residual blocks of the trunk, and heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, rms_norm


class ResidualBlock(nn.Module):
    """Pre-normalised residual block ``x + W₂·gelu(W₁·rms_norm(x))``; the hidden layer has twice the size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim)
        self.contract = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``, ``(..., dim)``."""
        update: Tensor = self.contract(gelu(self.expand(rms_norm(x, x.shape[-1:]))))
        return x + update


class Head(nn.Module):
    """Linear read-out ``W·z / dim`` whose initial output has a given variance.

    The input z has root mean square exactly 1, so over random W the output has variance
    ``dim · Var(W) · mean(z²) / dim² = Var(W) / dim``: with a target variance v,

        Var(W) = v · dim.

    v itself is hyperfan-in: a generated A of shape ``(r, in)`` that reads inputs of unit variance gives
    unit variance when v = 1/in, and B of shape ``(out, r)`` when v = 1/r, each split between a head and the factors
    that all tasks share.

    The factor 1/dim makes the step size of the *output* that of the learning rate: Adam moves every
    entry of W by about lr, hence ``W·z / dim`` by at most ``lr · mean|z| ≤ lr``, whatever the width. A learning rate
    that suits LoRA thus suits the hypernetwork.

    Source: hyperfan initialisation, Chang et al., "Principled Weight Initialization for
    Hypernetworks" (ICLR 2020), equations for linear layers; output multiplier as in maximal update
    parametrisation, Yang et al. 2022.
    """

    def __init__(self, dim: int, size: int, *, variance: float) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.randn(size, dim) * math.sqrt(variance * dim))

    def forward(self, z: Tensor) -> Tensor:
        """``(..., size)`` from ``(..., dim)`` of root mean square 1."""
        return linear(z / self.dim, self.weight)
