"""What is looked at before a task is pinned, removed, or merged into base weights."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import align_module_device
from torch import nn

from hyperadapt.routing.router import Router
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.layer import layers_in


def check_pin(router: Router, active: Sequence[str], task: str | None) -> None:
    """Refuse before the task of the first adapter has changed; None goes back to the default task."""
    if task is not None and not isinstance(task, str):
        raise TypeError(f"set_task got {task!r} ({type(task).__name__}); pass one task name, or None to unpin.")
    for name in active:
        config = router.network(name).config
        if task is not None:
            resolve_task_ids(task, config.task_names)
        if name in router.merged and router.merged[name] != (task or config.fallback_task):
            raise ValueError(
                f"Task {router.merged[name]!r} of adapter {name!r} is merged into the base weights, so "
                f"{task!r} cannot be pinned. Call unmerge_adapter() first."
            )


def check_removal(router: Router, adapter_name: str, task: str) -> None:
    """Refuse to remove the task in force."""
    if router.pinned_task(adapter_name) == task:
        raise ValueError(f"Task {task!r} cannot be removed: it is pinned; call set_task(None).")
    if router.merged.get(adapter_name) == task:
        raise ValueError(
            f"Task {task!r} cannot be removed: it is merged into the base weights; call unmerge_adapter()."
        )


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
