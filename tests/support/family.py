"""What a family of models is for a test: how to build a small one, run it, and take one row of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support.family_inputs import Batch


@dataclass(frozen=True)
class Family:
    """A model, its inputs for some rows of some length, and whether its rows may have different tasks.

    ``row(batch, index)`` is one row alone; ``run`` gives a tensor whose first dimension is the rows.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    is_mixed: bool
    row: Callable[[Batch, int], Batch] | None = None
    targets: str | list[str] = "all-linear"
    exclude: str | None = None
    run: Callable[[nn.Module, Batch], Tensor] | None = None

    def one(self, batch: Batch, index: int) -> Batch:
        """One row of a batch."""
        if self.row is not None:
            return self.row(batch, index)
        return {name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}


def made(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A class of transformers with its configuration, in float64; weights large enough to tell rows apart."""

    def build() -> nn.Module:
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**config, experts_implementation="eager")).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        return model

    return build


def generated(**options: Any) -> Callable[[nn.Module, Batch], Tensor]:
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False} | options

    def run(model: nn.Module, batch: Batch) -> Tensor:
        per_row = options.get("num_return_sequences", 1)
        found: Tensor = model.generate(**batch, **settings)
        return found.reshape(-1, per_row * found.shape[-1])

    return run


def generated_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Of music under guidance: each row has as many rows of scores as codebooks."""
    settings = {"guidance_scale": 3.0, "max_new_tokens": 3, "do_sample": False}
    found = model.generate(**batch, **settings, output_scores=True, return_dict_in_generate=True)
    return torch.cat(found.scores, dim=-1).reshape(len(batch["input_ids"]), -1)


def custom(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: kind().double().eval()
