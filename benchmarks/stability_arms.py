"""The arms of the stability study: what is trained, and how its hypernetwork's heads start.

The heads that emit B start at zero in every arm but one, so that training starts at the base model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from examples.support.matching import LabelMatcher
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.hypernetwork import Hypernetwork
from hyperadapt.normalization import NORMALIZATIONS

RANK = 8
TARGET_MODULES = ["query", "value"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        clip: Whether the gradient's norm is clipped at 1.
        changes: Change the start or the form of the hypernetwork; applied in order.
        config: Fields of the ``HyperAdapterConfig``; None is plain LoRA.
    """

    clip: bool = False
    changes: tuple[Callable[[Hypernetwork], None], ...] = ()
    config: dict[str, Any] | None = field(default_factory=lambda: {"normalization": "none"})


def without_shared(hypernetwork: Hypernetwork) -> None:
    """Leave out the factors that all tasks share; the heads start with their variance.

    Args:
        hypernetwork: The hypernetwork.
    """
    for shared in hypernetwork.shared.values():
        shared.requires_grad_(False).zero_()
    with torch.no_grad():
        for head in hypernetwork.heads.values():
            head.weight.mul_(math.sqrt(2))


def plain(hypernetwork: Hypernetwork) -> None:
    """Generate all with ordinary linear layers: torch's own start, no factor 1/dim before them, no shared factors.

    Args:
        hypernetwork: The hypernetwork; heads of B keep their zero start.
    """
    without_shared(hypernetwork)
    for name, head in hypernetwork.heads.items():
        linear = nn.Linear(head.weight.shape[1], head.weight.shape[0])
        if name.startswith("B"):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        hypernetwork.heads[name] = linear


def start_shared(hypernetwork: Hypernetwork) -> None:
    """Give the shared factors all the variance that a factor has at the start: it is the same for all tasks.

    Args:
        hypernetwork: The hypernetwork, whose shared factors carry half of it.
    """
    with torch.no_grad():
        for head in hypernetwork.heads.values():
            head.weight.zero_()
        for shared in hypernetwork.shared.values():
            shared.mul_(math.sqrt(2))


def normalize_weight(hypernetwork: Hypernetwork) -> None:
    """Split the heads' weights into a direction and a length for each row.

    Args:
        hypernetwork: The hypernetwork.
    """
    for head in hypernetwork.heads.values():
        # The direction of a zero row would be undefined; a length of zero is the same start.
        is_zero = not head.weight.any()
        weight_norm(head)
        if is_zero:
            nn.init.normal_(head.parametrizations.weight.original1)


def _at_size(size: str, **fields: Any) -> dict[str, Arm]:
    """The smaller set of arms, for a hypernetwork of another size."""
    return {
        f"{size}: none": Arm(config={"normalization": "none", **fields}),
        f"{size}: none + clipping": Arm(clip=True, config={"normalization": "none", **fields}),
        **{
            f"{size}: {name}": Arm(config={"normalization": name, **fields})
            for name in ("soft_frobenius", "frobenius", "spectral")
        },
    }


def _with_bound(name: str, bound: float) -> dict[str, Arm]:
    return {f"{name}, bound {bound}": Arm(config={"normalization": name, "normalization_bound": bound})}


ARMS: dict[str, Arm] = {
    "lora": Arm(config=None),
    "lora + clipping": Arm(clip=True, config=None),
    "none": Arm(),
    "none + clipping": Arm(clip=True),
    "none, plain heads": Arm(changes=(plain,)),
    "none, nothing shared": Arm(changes=(without_shared,)),
    "none, hyperfan for B too": Arm(config={"normalization": "none", "init_weights": False}),
    "none, shared start": Arm(changes=(start_shared,)),
    "none + weight norm": Arm(changes=(normalize_weight,)),
    "none, shared start + weight norm + clipping": Arm(clip=True, changes=(start_shared, normalize_weight)),
    **{name: Arm(config={"normalization": name}) for name in NORMALIZATIONS if name != "none"},
    "adaptive, zero gain": Arm(config={"normalization": "adaptive", "init_weights": "zero_gain"}),
    "soft_frobenius + clipping": Arm(clip=True, config={"normalization": "soft_frobenius"}),
    **_with_bound("soft_frobenius", 0.1),
    **_with_bound("soft_frobenius", 0.5),
    **_with_bound("frobenius", 0.1),
    **_with_bound("frobenius", 0.5),
    **_at_size("deep", hypernetwork_depth=8),
    **_at_size("wide", hypernetwork_dim=512),
    **_at_size("64, additive", hypernetwork_dim=64, conditioning="additive"),
}


def build(arm: Arm, base: LabelMatcher, tasks: Sequence[str], seed: int) -> PeftModel:
    """The base model with an arm's adapter.

    Args:
        arm: The arm.
        base: The base model, which stays as it is.
        tasks: Names of the tasks.
        seed: Of the adapter's weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    base = copy.deepcopy(base)
    if arm.config is None:
        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGET_MODULES))
    config = HyperAdapterConfig(r=RANK, lora_alpha=RANK, target_modules=TARGET_MODULES, tasks=list(tasks), **arm.config)
    model = get_peft_model(base, config)
    for change in arm.changes:
        change(model.base_model.hyperadapter_networks["default"].hypernetwork)
    return model
