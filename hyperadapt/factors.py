"""Generated factors of one position, and how they act on activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Factors:
    """A normalised update B·S·A of one position, for several tasks.

    Args:
        lora_A: Shape ``(tasks, r, in_features)``.
        lora_B: Shape ``(tasks, out_features, r)``.
        core: The matrix S, shape ``(tasks, r, r)``; holds the normalisation, gain and scaling.
    """

    lora_A: Tensor
    lora_B: Tensor
    core: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors.

        Returns:
            ``lora_A``, ``lora_B`` and ``core``, in the order of the constructor.
        """
        return self.lora_A, self.lora_B, self.core

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Compute ``x·(B·S·A)ᵀ`` through the rank-r activation; the product B·S·A is never formed.

        Args:
            x: Input, shape ``(..., in_features)``, in the dtype of the factors.
            rows: Which task each element of the first dimension of `x` uses, int64 of shape ``(len(x),)``;
                None if there is one task.

        Returns:
            Shape ``(..., out_features)``.
        """
        lora_A, lora_B, core = (tensor.to(x.device) for tensor in self.tensors())
        if rows is None:
            return linear(linear(linear(x, lora_A[0]), core[0]), lora_B[0])
        rows = rows.to(x.device)
        inputs = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        hidden = inputs @ lora_A[rows].mT
        return (hidden @ core[rows].mT @ lora_B[rows].mT).reshape(*x.shape[:-1], lora_B.shape[-2])

    def delta_weight(self) -> Tensor:
        """The dense update B·S·A of every task.

        Returns:
            Shape ``(tasks, out_features, in_features)``.
        """
        return self.lora_B @ self.core @ self.lora_A
