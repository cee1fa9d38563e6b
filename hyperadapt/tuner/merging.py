"""Merging of tasks into base weights, and what is looked at before one is merged, pinned or removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hyperadapt.config.checks import shown
from hyperadapt.routing.router import Router
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.building import check_in_use
from hyperadapt.tuner.layer import HyperAdapterLayer, layers_in


class MergingTuner(BaseTuner):
    """A tuner that merges the task in force."""

    router: Router

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the task in force to the base weights, of the active adapters if none are named.

        With ``safe_merge``, weights that are not finite are refused before any weight has changed.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        check_in_use(self.model, self.router)
        if merge:
            self._check_merge(adapter_names, safe_merge)
        self.router.stop_observing()
        return super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters; what is merged is unmerged at once, as a call need not reach all layers."""
        for layer in layers_in(self.model):
            if layer.merged:
                layer.unmerge()
        super().disable_adapter_layers()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse before the first module is merged, so that nothing stays half merged; None as names: the active."""
        check_in_use(self.model, self.router)
        places = _places(self.model)
        merging: list[str] = []
        layers = layers_in(self.model)
        for layer in layers:
            layer.check_mergeable()
            if adapter_names is None:
                layer.check_active(self.active_adapters)
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in layer.hyperadapter_position]
            # A quantised layer gets another weight.
            if layer.quantization_backend is None and not set(names) <= set(layer.merged_adapters):
                _check_own_weight(layer, places)
            merging += names
        asked = self.router.asked
        for name in dict.fromkeys(merging):
            if name not in self.router.merged:
                self.router.task_in_force(name)
            elif asked is not None:
                self.router.check_merged(name, asked.request)
        for layer in layers if safe_merge else ():
            # PEFT's onload_layer would not put the weights away after an error.
            with align_module_device(layer.get_base_layer()):
                layer.check_finite(adapter_names)


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


def _places(model: nn.Module) -> dict[int, list[str]]:
    """By a tensor's id, the paths to the modules with it, but for those that one of ``modules_to_save`` replaces."""
    places: defaultdict[int, list[str]] = defaultdict(list)
    replaced: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and set(module.active_adapters) & set(module.modules_to_save):
            replaced += (f"{path}.original_module.",)
        # One module may be there under several names, of which one alone is adapted.
        for name, part in module._modules.items():
            place = f"{path}.{name}".removeprefix(".")
            if part is not None and not f"{place}.".startswith(replaced):
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    places[id(tensor)].append(place.replace(".base_layer", ""))
    return places


def _check_own_weight(layer: HyperAdapterLayer, places: dict[int, list[str]]) -> None:
    """Refuse a weight that other modules have, too, or that is computed from others whenever it is read."""
    name = next(iter(layer.hyperadapter_position.values())).name
    found = places.get(id(layer.weight), [])
    if len(found) > 1:
        others = [place for place in found if place != name and place != name.rpartition(".")[0]]
        raise ValueError(
            f"The weight of {name!r} is also that of {shown(others)}, which merging would change, too, but the adapter "
            "does not. Use the task unmerged (set_task), or export it with export_lora."
        )
    if not found:
        raise ValueError(
            f"The weight of {name!r} is computed from other parameters, as weight_norm does, so that nothing can be "
            "merged into it. Use the task unmerged (set_task), or export it with export_lora."
        )
