"""The arms of the stability study: what a user can choose between, with what is chosen for each beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import DeloraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.stability.settings import Setting
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.hypernetwork import Hypernetwork

RANK = 8


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        fields: Fields of its configuration.
        method: The configuration's class.
        clip: Whether the gradient's norm is clipped at 1.
        weight_decay: AdamW's, per step and unit of the learning rate.
        change: Changes the form of the hypernetwork.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    method: type[PeftConfig] = HyperAdapterConfig
    clip: bool = False
    weight_decay: float = 0.0
    change: Callable[[Hypernetwork], None] | None = None

    @property
    def is_hyperadapter(self) -> bool:
        """Whether a hypernetwork makes its factors, and the model is told the tasks."""
        return self.method is HyperAdapterConfig


def plain(hypernetwork: Hypernetwork) -> None:
    """Generate all with torch's linear layers: no factor 1/dim before them, no shared factors; B starts at zero."""
    for shared in hypernetwork.shared.values():
        shared.requires_grad_(False).zero_()
    for name, head in hypernetwork.heads.items():
        linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], dtype=head.weight.dtype)
        if name.startswith("B"):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        hypernetwork.heads[name] = linear


ONLY = ""
"""The candidate of an arm that leaves nothing to choose."""


def _lora(**fields: Any) -> Arm:
    return Arm({"lora_alpha": RANK, **fields}, LoraConfig)


def _bounded(name: str, *candidates: tuple[float, int], **fields: Any) -> dict[str, Arm]:
    """A normalisation with each of some bounds and warm-ups."""
    return {
        f"bound {bound:g}, warm-up {warmup}": Arm(
            {"normalization": name, "normalization_bound": bound, "normalization_warmup": warmup}, **fields
        )
        for bound, warmup in candidates
    }


NONE = Arm({"normalization": "none"})
ARMS: dict[str, dict[str, Arm]] = {
    "lora": {ONLY: _lora()},
    "lora + clipping": {ONLY: replace(_lora(), clip=True)},
    "lora + weight decay": {f"decay {decay:g}": replace(_lora(), weight_decay=decay) for decay in (0.01, 0.1, 1, 10)},
    "rslora": {ONLY: _lora(use_rslora=True)},
    "dora": {ONLY: _lora(use_dora=True)},
    "delora": {f"lambda {value}": Arm({"delora_lambda": value}, DeloraConfig) for value in (5, 15)},
    "none": {ONLY: NONE},
    "none + clipping": {ONLY: replace(NONE, clip=True)},
    "hyperformer, plain": {ONLY: replace(NONE, change=plain)},
    "soft_frobenius": _bounded("soft_frobenius", (0.2, 1), (0.2, 20), (0.2, 30)),
    "soft_polar": _bounded("soft_polar", (0.2, 1), (0.2, 10), (0.2, 20), (0.2, 30), (0.3, 20)),
    "soft_polar + clipping": _bounded("soft_polar", (0.2, 1), (0.2, 20), (0.2, 30), clip=True),
    "default + clipping": {ONLY: Arm({"normalization": HyperAdapterConfig.normalization}, clip=True)},
    "adaptive": _bounded("adaptive", (0.2, 20), (0.2, 30)),
    "whitening": {ONLY: Arm({"normalization": "whitening"})},
}
"""Arm -> candidate -> what is trained. The stage "choose" runs all candidates, the stage "blind" the chosen ones."""


def is_hyperadapter(name: str) -> bool:
    """Whether an arm has a hypernetwork."""
    return all(arm.is_hyperadapter for arm in ARMS[name].values())


def build(arm: Arm, setting: Setting, base: nn.Module, seed: int) -> PeftModel:
    """A copy of the base model with an arm's adapter, whose weights a seed draws."""
    torch.manual_seed(seed)
    fields = dict(r=RANK, target_modules=list(setting.target_modules), **arm.fields)
    if arm.is_hyperadapter:
        fields |= dict(lora_alpha=RANK, tasks=list(setting.tasks), **setting.hypernetwork)
    # Adapters are as wide as the base model, bfloat16, unless PEFT widens them as it does by default.
    model = get_peft_model(copy.deepcopy(base), arm.method(**fields), autocast_adapter_dtype=setting.widens_adapters)
    if arm.change is not None:
        arm.change(model.base_model.hyperadapter_networks["default"].hypernetwork)
    return model
