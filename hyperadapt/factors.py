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

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:  # noqa: DOC502
        """Compute ``x·(B·S·A)ᵀ`` through the rank-r activation; the product B·S·A is never formed.

        Args:
            x: Input, shape ``(..., in_features)``, in the dtype of the factors.
            rows: Which task each row of the batch uses, int64 of shape ``(batch,)``; None if there is one
                task. Where the first dimension of `x` is a multiple k of the batch (beams, several
                returned sequences, flattened tokens), each row stands for k neighbouring ones.

        Returns:
            Shape ``(..., out_features)``.

        Raises:
            ValueError: If the first dimension of `x` is not a multiple of the batch.
        """
        lora_A, lora_B, core = (tensor.to(x.device) for tensor in self.tensors())
        if rows is None:
            return linear(linear(linear(x, lora_A[0]), core[0]), lora_B[0])
        rows = _repeat_rows(rows.to(x.device), x.shape[0])
        inputs = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        hidden = inputs @ lora_A[rows].mT
        return (hidden @ core[rows].mT @ lora_B[rows].mT).reshape(*x.shape[:-1], lora_B.shape[-2])

    def delta_weight(self) -> Tensor:
        """The dense update B·S·A of every task.

        Returns:
            Shape ``(tasks, out_features, in_features)``.
        """
        return self.lora_B @ self.core @ self.lora_A


def _repeat_rows(rows: Tensor, size: int) -> Tensor:
    if size == len(rows):
        return rows
    if size % len(rows):
        raise ValueError(
            f"An adapted module got an input whose first dimension is {size}, which is no multiple of the {len(rows)} "
            "rows that tasks were given for, so rows cannot be told apart there. Leave the module out with "
            "exclude_modules, or use one task per batch."
        )
    return rows.repeat_interleave(size // len(rows))
