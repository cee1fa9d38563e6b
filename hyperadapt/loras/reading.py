"""Reading ordinary PEFT LoRA folders as updates at the positions of a hyperadapter."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyperadapt.config.checks import check_integer, check_number, shown
from hyperadapt.config.module_fields import check_pattern
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.positions import Position

# What makes a LoRA compute something else than the base weight plus scaling·B·A.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "monteclora_config", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices"),
)
# They subtract the initial update from the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")
_SHOWN_NAMES = 5


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a LoRA's folder holds."""

    # By position name A (r, in_features) and B (out_features, r) as the file holds them, and as core the scaling times
    # the identity; no entry where the LoRA has no factors.
    updates: dict[str, Factors]
    # Number of weights in the file, and their size.
    parameters: int
    num_bytes: int


def read_lora(task: str, folder: str | os.PathLike[str], positions: Mapping[str, Position]) -> LoraFile:
    """Read a LoRA folder, from the disk alone; `positions`, by name, are those that it may adapt.

    The scaling is ``lora_alpha / r``, or ``lora_alpha / √r`` with ``use_rslora``; ``rank_pattern`` and
    ``alpha_pattern`` are heeded. Kernels of convolutions are flattened as a hyperadapter does.
    """
    path, where = Path(folder), f"The LoRA of task {task!r} in {str(folder)!r}"
    for file in (path / CONFIG_NAME, path / SAFETENSORS_WEIGHTS_NAME):
        if not file.is_file():
            raise FileNotFoundError(
                f"{where} has no {file.name}. Pass a folder that save_pretrained wrote; weights in another format need "
                "to be loaded with PEFT and saved again."
            )
    config = _read_config(path, where)
    try:
        state_dict = load_file(path / SAFETENSORS_WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{where} has a damaged {SAFETENSORS_WEIGHTS_NAME} ({error}). Get it again.") from error
    pairs = _pairs(state_dict, where)
    unknown = [name for name in pairs if name not in positions]
    if unknown:
        rest = f" and {len(unknown) - _SHOWN_NAMES} more" if len(unknown) > _SHOWN_NAMES else ""
        raise ValueError(
            f"{where} adapts {', '.join(map(repr, unknown[:_SHOWN_NAMES]))}{rest}, which this hyperadapter does not. "
            "Make the hyperadapter with target_modules that take them in, on the base model class the LoRA was trained "
            "on."
        )
    updates = {name: _update(positions[name], pair, config, where) for name, pair in pairs.items()}
    tensors = list(state_dict.values())
    return LoraFile(updates, sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors))


def _read_config(path: Path, where: str) -> LoraConfig:
    try:
        fields = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        peft_type = fields["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{where} has an {CONFIG_NAME} that is no configuration of PEFT ({error!r}). Get it again."
        ) from error
    if peft_type != "LORA":
        raise ValueError(f"{where} is of peft_type {shown(peft_type)}; only 'LORA' can be distilled.")
    try:
        config = LoraConfig.from_pretrained(str(path))
        assert isinstance(config, LoraConfig)
        check_integer("r", config.r)
        check_number("lora_alpha", config.lora_alpha)
        check_pattern("rank_pattern", config.rank_pattern or {}, check_integer)
        check_pattern("alpha_pattern", config.alpha_pattern or {}, check_number)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has an {CONFIG_NAME} that cannot be used: {error}") from error
    for name in _UNSUPPORTED:
        if getattr(config, name, None):
            raise ValueError(
                f"{where} has {name}={shown(getattr(config, name))}, which does more than to add scaling·B·A to the "
                "base weights. Only plain LoRAs can be distilled: train it without."
            )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, which changes the base weights. Save it as an update of the "
            "original ones, with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if config.modules_to_save:
        raise ValueError(
            f"{where} has modules_to_save={shown(config.modules_to_save)}, modules trained in full, one for each LoRA; "
            "a hyperadapter keeps one for all tasks. Train the LoRAs without, on a base model that holds these modules "
            "already."
        )
    if config.bias != "none":
        raise ValueError(
            f"{where} has bias={config.bias!r}, but a hyperadapter generates no biases. Train it with bias='none'."
        )
    return config


def _pairs(state_dict: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """The tensors by position name and factor."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{where} holds {shown(key)} besides its factors, which a hyperadapter cannot generate. Only plain "
                "LoRAs can be distilled; embeddings that were saved along are left out with "
                "save_pretrained(..., save_embedding_layers=False)."
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{where} holds {shown(key)} with weights that are not finite numbers ({tensor.dtype}): its training "
                "has diverged or the file is damaged. Train it or get it again."
            )
        pairs.setdefault(match["name"], {})[match["factor"]] = tensor
    for name, pair in pairs.items():
        if len(pair) < 2:
            [other] = {"A", "B"} - pair.keys()
            raise ValueError(f"{where} has no factor {other} for {name!r}. The file is damaged: get it again.")
    return pairs


def _update(position: Position, pair: Mapping[str, Tensor], config: LoraConfig, where: str) -> Factors:
    lora_A, lora_B = (pair[factor].flatten(1) for factor in "AB")
    r = _by_pattern(config.rank_pattern or {}, position.name, config.r)
    alpha = _by_pattern(config.alpha_pattern or {}, position.name, config.lora_alpha)
    shapes = (r, position.in_features), (position.out_features, r)
    if (lora_A.shape, lora_B.shape) != shapes:
        raise ValueError(
            f"{where} has factors of shapes {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)} for "
            f"{position.name!r}, where its rank of {shown(r)} and this base model need {shapes[0]} and {shapes[1]}. It "
            f"was trained on another base model, or belongs to another {CONFIG_NAME}."
        )
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return Factors(lora_A, lora_B, scaling * torch.eye(r))


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """What PEFT's LoRA takes for a module."""
    return pattern.get(get_pattern_key(list(pattern), name), default)
