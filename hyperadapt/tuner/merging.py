"""What is looked at before a task is merged into base weights."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import align_module_device
from torch import nn

from hyperadapt.tuner.layer import layers_in


def check_merge(model: nn.Module, active: Sequence[str], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse before the first module is merged, so that nothing stays half merged; None as names: the active ones."""
    layers = layers_in(model)
    for layer in layers:
        layer.check_mergeable()
        if adapter_names is None:
            layer.check_active(active)
    for layer in layers if safe_merge else ():
        # PEFT's onload_layer would not put the weights away after an error.
        with align_module_device(layer.get_base_layer()):
            layer.check_finite(adapter_names)
