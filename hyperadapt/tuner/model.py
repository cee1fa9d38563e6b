"""The tuner model: wraps the base model's modules, owns the networks, and opens a scope for every forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.hypernetwork.sharding import make_whole
from hyperadapt.routing.checkpointing import CheckpointFunction
from hyperadapt.routing.forward_pass import current_scope
from hyperadapt.routing.router import Request, Router, Tasks, main_input
from hyperadapt.tasks.embedding import resolve_task_ids
from hyperadapt.tasks.encoders import with_text_vectors
from hyperadapt.tuner.base_norms import base_norm, is_made_empty
from hyperadapt.tuner.layer import (
    HyperAdapterConvolution,
    HyperAdapterEmbedding,
    HyperAdapterLayer,
    HyperAdapterLinear,
)
from hyperadapt.tuner.loading import (
    check_saved_modules,
    check_size,
    checked_state_dict,
    guard_loading,
    unwrap_saved_modules,
)
from hyperadapt.tuner.task_editing import TaskEditing

ROUTING_ARGUMENTS = ("tasks", "task_embeddings")


class HyperAdapterModel(TaskEditing):
    """PEFT tuner for hyperadapters; made by ``get_peft_model`` with a ``HyperAdapterConfig``.

    Args:
        model: The base model.
        config: Configuration by adapter name.
        adapter_name: The first adapter.
        low_cpu_mem_usage: Whether to make adapter parameters without memory, to be loaded later.
        state_dict: State to find target modules from.
    """

    prefix = "hyperadapter_"
    tuner_layer_cls = HyperAdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    uses_shared_state = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the target modules and build the adapter's network; on any error the model is left as it was.

        Args:
            model: The base model.
            adapter_name: The adapter.
            autocast_adapter_dtype: As in PEFT.
            low_cpu_mem_usage: Whether to make parameters without memory, to be loaded later.
            state_dict: State to find target modules from.

        Raises:
            Exception: Whatever went wrong, after the model was put back.
        """
        others = {parameter: parameter.requires_grad for parameter in self.hyperadapter_networks.parameters()}
        base_requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._base_norms: dict[str, Tensor] = {}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            with ExitStack() as stack:
                if low_cpu_mem_usage:
                    stack.enter_context(init_empty_weights())
                self.hyperadapter_networks[adapter_name] = self._build_network(adapter_name)
        except Exception:
            self._remove_adapter(model, adapter_name)
            if not self.hyperadapter_networks:
                self._observer.remove()
            for parameter, requires_grad in (base_requires_grad | others).items():
                parameter.requires_grad_(requires_grad)
            raise
        for parameter, requires_grad in others.items():
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its network.

        Args:
            adapter_name: The adapter.
        """
        super().delete_adapter(adapter_name)
        self.router.forget(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:  # noqa: DOC502
        """Add the task in force to the base weights.

        Args:
            adapter_names: The adapters to merge; None for the active ones.
            safe_merge: Whether to refuse, before any weight has changed, a merge that gives weights that are not
                finite.

        Raises:
            TypeError: If a base layer is quantised in a way that cannot be merged into.
            ValueError: If `safe_merge` finds weights that are not finite.
        """
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        self._observer.remove()
        return super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Refuse before the first module is merged, so that nothing stays half merged."""
        for layer in self._layers(self.model):
            layer.check_mergeable()
        for layer in self._layers(self.model) if safe_merge else ():
            # PEFT's onload_layer would not put the weights away after an error.
            with align_module_device(layer.get_base_layer()):
                layer.check_finite(adapter_names)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.hyperadapter_networks = nn.ModuleDict()
        self.router = Router(self.hyperadapter_networks)
        # The task-specific PeftModels hide their inputs from the tuner, and generate changes them. Not registered for
        # each call, because that cannot be compiled.
        self._observer = model.register_forward_pre_hook(self._observe_input, with_kwargs=True)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, HyperAdapterConfig)
        layer = target if isinstance(target, HyperAdapterLayer) else self._wrap(target, parent, current_key)
        r, scaling = peft_config.rank_and_scaling(current_key)
        position = Position(current_key, layer.in_features, layer.out_features, r, scaling, layer.fan_in)
        # Read here, so that an unusable weight is refused before PEFT goes on to wrap modules_to_save. Parameters that
        # come from a file bring the norms along.
        if not is_made_empty():
            self._base_norms[current_key] = base_norm(layer, position)
        layer.update_layer(adapter_name, position, peft_config.lora_dropout)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies a `weight`, which a quantised layer need not have, to where it already is.
        setattr(parent, child_name, new_module)

    def _wrap(self, target: nn.Module, parent: nn.Module, name: str) -> HyperAdapterLayer:
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        layer_type: type[HyperAdapterLayer] | None = None
        if isinstance(parent, nn.MultiheadAttention):
            reason = "part of nn.MultiheadAttention, which reads its weight without calling it"
        elif isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d) and target.groups > 1:
            reason = f"a convolution with groups={target.groups}"
        else:
            reason = f"of type {type(target).__name__}"
            if isinstance(target, nn.Linear | Conv1D) or (backend is not None and backend.layer_type == "linear"):
                layer_type = HyperAdapterLinear
            elif isinstance(target, nn.Embedding):
                layer_type = HyperAdapterEmbedding
            elif isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                layer_type = HyperAdapterConvolution
        if layer_type is None or isinstance(target, BaseTunerLayer):
            raise TypeError(
                f"Module {name!r} is {reason}, which hyperadapters cannot adapt: they adapt linear layers (nn.Linear, "
                "Conv1D and quantised linear layers), nn.Embedding and convolutions with one group. Take it out of "
                "target_modules, or list it in exclude_modules."
            )
        return layer_type(target, self.router, backend)

    def _build_network(self, adapter_name: str) -> HyperAdapterNetwork:
        config = self.peft_config[adapter_name]
        assert isinstance(config, HyperAdapterConfig)
        layers = [layer for layer in self._layers(self.model) if adapter_name in layer.hyperadapter_position]
        positions = [layer.hyperadapter_position[adapter_name] for layer in layers]
        unread = torch.tensor(math.nan)
        norms = torch.stack([self._base_norms.get(position.name, unread) for position in positions])
        check_saved_modules(self.model, adapter_name)
        config, text_vectors = with_text_vectors(config)
        # Not written into the caller's configuration, which may serve for another model.
        self.peft_config[adapter_name] = config
        check_size(config, positions, self.model)
        network = HyperAdapterNetwork(config, positions, norms)
        # Offloaded weights show the meta device until they are needed.
        with align_module_device(layers[0].get_base_layer()):
            weight = layers[0].weight
        dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.get_default_dtype()
        # Trainability follows PEFT: the active adapters train, unless loaded for inference.
        network.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        device = None if next(network.parameters()).is_meta else weight.device
        network.to(device, dtype)
        # Only the parameters take the base's dtype: norms and text vectors rounded to it would stay rounded.
        network.base_norms = norms.to(device)
        if not network.task_embedding.is_all_learned:
            network.task_embedding.text_vectors = network.task_embedding.text_vectors.float()
        if text_vectors is not None:
            network.task_embedding.set_text_vectors(text_vectors)
        return network

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        network = self.router.network(adapter_name)
        if autocast_adapter_dtype and next(network.parameters()).element_size() < 4:
            network.float()

    def _remove_adapter(self, model: nn.Module, adapter_name: str) -> None:
        unwrap_saved_modules(model, adapter_name)
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, HyperAdapterLayer):
                continue
            layer.remove_adapter(adapter_name)
            if not layer.hyperadapter_position:
                model.set_submodule(name, layer.base_layer)
        if adapter_name in self.hyperadapter_networks:
            del self.hyperadapter_networks[adapter_name]

    @contextmanager
    def _enable_peft_forward_hooks(
        self,
        *args: Any,
        tasks: Tasks | None = None,
        task_embeddings: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names={adapter_names!r} is not supported by hyperadapters: one adapter serves many tasks. "
                "Name the task of each row with tasks= instead."
            )
        model_input = main_input(self.model, args, kwargs)
        request = Request(tasks, task_embeddings)
        with ExitStack() as stack:
            stack.enter_context(self.router.open(request, self.active_adapters, model_input))
            stack.enter_context(self._checkpoints_carry_factors())
            yield

    def _observe_input(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model_input, scope = main_input(model, args, kwargs), current_scope(self.router)
        if model_input is not None and scope is not None:
            scope.observe(model_input)

    @contextmanager
    def _checkpoints_carry_factors(self) -> Iterator[None]:
        """Let gradient checkpointing carry factors while a scope is open; nothing stays behind on the blocks."""
        wrapped: list[tuple[nn.Module, Any]] = []
        if self.model.training and torch.is_grad_enabled():
            for module in self.model.modules():
                # Read from __dict__: a wrapper must not be found through another module.
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and getattr(module, "gradient_checkpointing", False):
                    names = [
                        position.name
                        for layer in self._layers(module)
                        for position in set(layer.hyperadapter_position.values())
                    ]
                    module.__dict__["_gradient_checkpointing_func"] = CheckpointFunction(function, self.router, names)
                    wrapped.append((module, function))
        try:
            yield
        finally:
            for module, function in wrapped:
                module.__dict__["_gradient_checkpointing_func"] = function

    @staticmethod
    def _layers(module: nn.Module) -> list[HyperAdapterLayer]:
        return [layer for layer in module.modules() if isinstance(layer, HyperAdapterLayer)]

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *, state_dict: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        make_whole(state_dict, (cls.prefix, ".modules_to_save."))
        return super()._get_adapter_state_dict(model, state_dict=state_dict, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_state_dict(model, adapter_name, state_dict, renamed)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f"hyperadapter_networks.{adapter_name}."
        if marker in key:
            return key.replace(marker, "hyperadapter_networks.", 1)
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return name


@contextmanager
def use_tasks(model: nn.Module, tasks: Tasks | None = None, *, task_embeddings: Tensor | None = None) -> Iterator[None]:
    """Set the tasks of the calls inside, for code that owns the call and cannot pass ``tasks=``.

    Args:
        model: A model with a hyperadapter, wrapped or not.
        tasks: One name for all rows, one name per row, or integer ids ``(batch,)``.
        task_embeddings: Shape ``(batch, task_embedding_dim)``, or ``(task_embedding_dim,)`` for all rows: for
            conditions that have no id.

    Yields:
        None.

    Raises:
        ValueError: If nothing or both are given, or a task is unknown.
    """
    request = Request(tasks, task_embeddings)
    if request.is_empty:
        raise ValueError("use_tasks got tasks=None and no task_embeddings; pass one of the two.")
    tuner = find_tuner(model)
    if tasks is not None:
        for name in tuner.active_adapters:
            resolve_task_ids(tasks, tuner.router.network(name).config.task_names)
    tuner.router.requests.append(request)
    try:
        yield
    finally:
        tuner.router.requests.pop()


def find_tuner(model: nn.Module) -> HyperAdapterModel:
    """The hyperadapter tuner inside a model.

    Args:
        model: A ``PeftModel``, possibly wrapped (DDP, ``torch.compile``).

    Returns:
        The tuner.

    Raises:
        TypeError: If there is none.
    """
    for module in model.modules():
        if isinstance(module, HyperAdapterModel):
            return module
    raise TypeError(
        f"{type(model).__name__} has no hyperadapter. Make one with get_peft_model(model, HyperAdapterConfig(...)) or "
        "load one with PeftModel.from_pretrained."
    )


def _strip_routing_arguments(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Have a ``PeftModel`` keep the routing arguments from the base model's forward and generate.

    PEFT strips the names in ``special_peft_forward_args`` everywhere (generate's argument check and
    disabled adapters included), but a tuner is never told which PeftModel it becomes part of.
    """
    if isinstance(submodule, HyperAdapterModel) and isinstance(module, PeftModel):
        module.special_peft_forward_args.update(ROUTING_ARGUMENTS)
        guard_loading(module)


register_module_module_registration_hook(_strip_routing_arguments)
