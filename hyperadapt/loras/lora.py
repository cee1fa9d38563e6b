"""The LoRA of one task, as it is exported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils.transformers_weight_conversion import (  # type: ignore[attr-defined]
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_TARGET_MODULE_MAPPING,
)
from torch import Tensor

from hyperadapt.config.adapted_fields import AdaptedModel
from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors, without_column
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.loras.tensor_files import TensorFiles

# Servers make room for LoRAs of these ranks.
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class LoraFamily:
    """What the LoRAs of one hyperadapter share: its configuration, positions by path, and modules trained in full.

    The latter are tensors by their names in a saved adapter. Of a live model it is known which convolutions have a
    dilation or padding mode.
    """

    adapter: HyperAdapterConfig
    positions: Mapping[str, Position]
    saved: Mapping[str, Tensor]
    uncommon_convolutions: Sequence[str] = ()

    @cached_property
    def base(self) -> AdaptedModel:
        """What is known of the base model."""
        return self.adapter.base_facts

    @cached_property
    def layer_names(self) -> dict[str, str]:
        """By position name the path of its layer in a model with PEFT's LoRA: those of experts lie in one another."""
        names = {name: name for name, position in self.positions.items() if not position.experts}
        taken: set[str] = set()
        for name in [name for name in self.positions if name not in names]:
            path = name.rpartition(".")[0]
            # The outermost layer comes first.
            while path in taken:
                path += ".base_layer"
            names[name] = path
            taken.add(path)
        return names

    @cached_property
    def r(self) -> int:
        """The rank that a LoRA gets everywhere: the smallest of ``RANKS`` that holds all, else the largest itself."""
        largest = max(position.r for position in self.positions.values())
        return next((rank for rank in RANKS if rank >= largest), largest)

    def config(self) -> LoraConfig:
        """The configuration; a new one, as PEFT may change it."""
        modules = [name for name, position in self.positions.items() if not position.experts]
        endings = {name.rpartition(".")[2] for name in modules}
        config = LoraConfig(
            r=self.r,
            # The scaling is in the factors.
            lora_alpha=self.r,
            fan_in_fan_out=any(position.kind == "Conv1D" for position in self.positions.values()),
            modules_to_save=self.adapter.modules_to_save,
            task_type=self.adapter.task_type,
            base_model_name_or_path=self.adapter.base_model_name_or_path,
            revision=self.adapter.revision,
            inference_mode=True,
            # By their whole names, since in other layers they may not be adapted.
            target_parameters=sorted(self.positions.keys() - set(modules)) or None,
        )
        # Servers expect the last components, if they mean nothing else. Given above, it would become a set.
        config.target_modules = sorted(endings if self.base.has_own_endings else modules)
        return config

    @cached_property
    def files(self) -> TensorFiles:
        """Writes their files as PEFT does."""
        return TensorFiles({"format": "pt"})

    @cached_property
    def config_file(self) -> str:
        """What PEFT writes of the configuration."""
        with TemporaryDirectory() as folder:
            self.config().save_pretrained(folder)
            return Path(folder, CONFIG_NAME).read_text(encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Lora:
    """The LoRA of one task, of one rank everywhere; its scaling is in the factors."""

    family: LoraFamily
    # By position name the tensors by the ends of their names in a saved adapter: ``lora_A.weight`` (r, in_features) and
    # ``lora_B.weight`` (out_features, r), of experts (experts · r, in_features) and (out_features, r · experts).
    factors: Mapping[str, Mapping[str, Tensor]]
    # None where a description or examples asked for it.
    task: str | None
    descriptions: Sequence[str]

    @property
    def has_labels(self) -> bool:
        """Whether its task has labels, and there is a config.json to name them in."""
        labels = self.family.adapter.labels_of(self.task) if self.task else None
        return bool(labels) and self.family.base.config is not None

    @property
    def base_config(self) -> dict[str, Any] | None:
        """What the base model's config.json holds, with the names of a classifier's outputs for this task, if any."""
        config = self.family.base.config
        if config is None or not self.has_labels:
            return config
        names = self.family.adapter.output_names(self.task)
        id2label = {str(output): name for output, name in names.items()}
        return {**config, "id2label": id2label, "label2id": {name: output for output, name in names.items()}}

    @property
    def is_zero(self) -> bool:
        """Whether the update is zero everywhere, as before training."""
        # Ends at the first position that is not, which is nearly always the first one.
        return not any(all(bool(tensor.any()) for tensor in pair.values()) for pair in self.factors.values())

    def named_factors(self, prefix: str) -> dict[str, Tensor]:
        """A and B of all modules by their names in a file, which start with `prefix`."""
        paths = self.family.layer_names
        return {
            f"{prefix}{paths[name]}.{end}": tensor
            for name, pair in self.factors.items()
            for end, tensor in pair.items()
        }


def warn_of_mistakes(families: Sequence[LoraFamily], format: str) -> None:
    """Say what PEFT makes of an export that it does not compute as it is meant."""
    for family in families if format == "peft" else ():
        _warn_of_mistaken_names(family)
        if family.uncommon_convolutions:
            warnings.warn(
                f"The export adapts {shown(family.uncommon_convolutions)}, which have a dilation or padding mode. PEFT "
                "computes LoRAs of convolutions without. Merge the export where it is loaded (merge_and_unload): that "
                "is exact.",
                stacklevel=4,
            )


def _warn_of_mistaken_names(family: LoraFamily) -> None:
    """PEFT takes linear layers of some mixtures for experts, which had their names before transformers 5."""
    model_type = (family.base.config or {}).get("model_type", "")
    mistaken = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {})
    modules = [name for name, one in family.positions.items() if not one.experts]
    names = [name for name in modules if name.rpartition(".")[2] in mistaken]
    if names:
        endings = "|".join(sorted({name.rpartition(".")[2] for name in names}))
        warnings.warn(
            f"The export adapts {shown(names)}, linear layers of a model of type {model_type!r}. PEFT takes their "
            "names for those of experts, and cannot load the export as it is. For one that it loads, leave them "
            f"out when the adapter is made: exclude_modules=r'.*\\.({endings})'. Or merge the task.",
            stacklevel=5,
        )


def warn_of_zeros(loras: Sequence[str | None]) -> None:
    """Say that LoRAs change nothing, by their tasks; None stands for one that a description or examples asked for."""
    if loras:
        names = shown([name or "(new)" for name in loras])
        warnings.warn(
            f"The exported update of {names} is all zero, so it leaves the base model as it is. The adapter is "
            "untrained: train it, or load its weights, and export again.",
            stacklevel=4,
        )


def lora_tensors(position: Position, factors: Factors, r: int) -> dict[str, Tensor]:
    """One task's update as PEFT's LoRA layer would save it, by the ends of the names; scaling 1, zeros up to rank r.

    The core is part of B.
    """
    lora_A = _with_zeros(factors.lora_A[0].cpu(), r, -2)
    lora_B = _with_zeros(factors.lora_B[0].cpu(), r, -1)
    if position.experts:
        # One expert after the other in A; in B all experts' first columns, then all second ones.
        return {"lora_A.weight": lora_A.flatten(0, 1), "lora_B.weight": lora_B.permute(1, 2, 0).flatten(1)}
    if position.kind == "Embedding":
        return {"lora_embedding_A": without_column(lora_A, position.padding_idx), "lora_embedding_B": lora_B}
    if position.kernel is not None:
        # A is a convolution with the base layer's kernel, B one with a kernel of size 1.
        lora_A = lora_A.reshape(-1, *position.kernel)
        lora_B = lora_B.reshape(*lora_B.shape, *(1 for _ in position.kernel[1:]))
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def _with_zeros(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A factor, contiguous, with zeros added up to a size."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
