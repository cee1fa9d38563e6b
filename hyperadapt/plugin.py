"""All that is changed in PEFT, and in transformers.

- Three mappings get this method.
- The constructor of ``PeftModel`` looks whether the model has a hyperadapter, and changes that model alone: it keeps
  ``tasks`` and what belongs to it from the base model, loads adapters with checks of its own, publishes with our card,
  and trains the head of token classification and of question answering. A tuner cannot do this, since it is never told
  which model it becomes part of.
- ``AutoPeftModelForSequenceClassification``, and that for tokens, load the base model of a hyperadapter with as many
  outputs as it was trained with, and their names.
- ``pipeline("text-classification")`` answers with the labels of a task, once there is a classifier with a hyperadapter.
- Two helpers that make optimizers for LoRA's factors refuse a model that has none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from peft import (
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    PeftModelForQuestionAnswering,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    optimizers,
)
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from hyperadapt.config.config import HyperAdapterConfig, HyperAdapterType
from hyperadapt.hub.push import create_or_update_model_card, push_to_hub
from hyperadapt.routing.forward_pass import ROUTING_ARGUMENTS, check_spelling
from hyperadapt.tuner.loading import load_adapter
from hyperadapt.tuner.model import HyperAdapterModel

METHODS: dict[str, Callable[..., Any]] = {
    "load_adapter": load_adapter,
    "push_to_hub": push_to_hub,
    "create_or_update_model_card": create_or_update_model_card,
}
CLASSIFIERS = (AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification)
# What the constructors of these write into the caller's `modules_to_save` after the adapter is made, which has a copy.
HEADS: dict[type[PeftModel], list[str]] = {
    PeftModelForTokenClassification: ["classifier", "score"],
    PeftModelForQuestionAnswering: ["qa_outputs"],
}
# The third, of Riemannian preconditioning, refuses by itself a model without LoRA's factors.
LORA_OPTIMIZERS = ("create_loraplus_optimizer", "create_lorafa_optimizer")


def register() -> None:
    """Make PEFT know the method; harmless if done again, and refused if another package has taken name or prefix.

    PEFT's ``register_peft_method`` takes only members of its closed ``PeftType`` enum, so the three
    mappings it fills are filled here, with a type of our own.
    """
    kind, prefix = HyperAdapterType.HYPERADAPTER, HyperAdapterModel.prefix
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    registered = configs.get(kind)
    # Compared by name, so that reloading the package is no clash with itself.
    if registered is not None and not registered.__module__.startswith("hyperadapt."):
        raise RuntimeError(
            f"The PEFT method name {kind.value!r} is taken by {registered.__module__}.{registered.__qualname__}. The "
            "two packages cannot be used in one process; uninstall or do not import the other one."
        )
    if any(taken == prefix and other != kind for other, taken in prefixes.items()):
        raise RuntimeError(
            f"The parameter prefix {prefix!r} is taken by another PEFT method; uninstall or do not import its package."
        )
    configs[kind] = HyperAdapterConfig
    tuners[kind] = HyperAdapterModel
    prefixes[kind] = prefix
    if not getattr(PeftModel.__init__, "adopts_hyperadapters", False):
        PeftModel.__init__ = _adopting(PeftModel.__init__)  # type: ignore[method-assign]
        auto: Any
        for auto in CLASSIFIERS:
            auto.from_pretrained = classmethod(_with_all_outputs(auto.from_pretrained.__func__))
        for name in LORA_OPTIMIZERS:
            create = getattr(optimizers, name)
            for module in (optimizers, sys.modules[create.__module__]):
                setattr(module, name, _refusing(create))


def _adopting(construct: Callable[..., None]) -> Callable[..., None]:
    """The constructor of ``PeftModel``, which then gives a model with a hyperadapter what it needs.

    PEFT strips the names in ``special_peft_forward_args`` everywhere, generate's argument check and disabled adapters
    included.
    """

    @functools.wraps(construct)
    def construct_and_adopt(peft_model: PeftModel, /, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, HyperAdapterConfig):
            peft_config = _with_head(peft_config, peft_model)
        construct(peft_model, model, peft_config, *args, **kwargs)
        if isinstance(peft_model.base_model, HyperAdapterModel):
            peft_model.special_peft_forward_args.update(ROUTING_ARGUMENTS)
            peft_model.register_forward_pre_hook(_check_task_ids, with_kwargs=True)
            # Partials, unlike closures, follow the model through copy and pickle.
            vars(peft_model).update({name: functools.partial(method, peft_model) for name, method in METHODS.items()})
            if isinstance(peft_model, PeftModelForSequenceClassification):
                # Its import waits until a pipeline could be asked for.
                from hyperadapt.tuner.pipelines import register as register_pipeline

                register_pipeline()

    construct_and_adopt.adopts_hyperadapters = True  # type: ignore[attr-defined]
    return construct_and_adopt


def _with_head(config: HyperAdapterConfig, peft_model: PeftModel) -> HyperAdapterConfig:
    """A copy that names the head of a model's kind as well, and each module once."""
    heads = (name for kind, names in HEADS.items() if isinstance(peft_model, kind) for name in names)
    return config.replaced(modules_to_save=list(dict.fromkeys([*(config.modules_to_save or ()), *heads])) or None)


def _check_task_ids(model: PeftModel, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what PEFT's classes for a ``task_type`` take for prompts, and drop before the tuner sees it."""
    if kwargs.get("task_ids") is not None and isinstance(model.active_peft_config, HyperAdapterConfig):
        check_spelling(model.get_base_model(), {"task_ids": kwargs["task_ids"]})


def _with_all_outputs(load: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """The loader of a class that finds the base model: of a hyperadapter, with the outputs that it was trained with."""

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PeftModel:
        given = {name: value for name, value in kwargs.items() if name not in ("config", "adapter_name")}
        config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **given)
        if isinstance(config, HyperAdapterConfig) and config.adapted_model is not None and config.output_names():
            own = type(cls.__name__, (cls,), {"_target_class": _Sized(cls._target_class, config)})
            return load(own, pretrained_model_name_or_path, *args, **kwargs)
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


class _Sized:
    """Loads a base model whose classifier suits an adapter."""

    def __init__(self, loader: Any, config: HyperAdapterConfig) -> None:
        self.loader, self.config = loader, config

    def from_pretrained(self, path: str, **options: Any) -> Any:
        """The base model; what its caller asks for comes first."""
        if not {"num_labels", "id2label", "config"} & options.keys():
            names = self.config.output_names()
            options |= {"id2label": names, "label2id": {name: output for output, name in names.items()}}
        return self.loader.from_pretrained(path, **{"ignore_mismatched_sizes": True, **options})


def _refusing(create: Callable[..., Any]) -> Callable[..., Any]:
    """A helper that finds factors by LoRA's names of parameters, which here would find none and say nothing."""

    @functools.wraps(create)
    def create_for_lora(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, HyperAdapterModel) for module in model.modules()):
            raise TypeError(
                f"{create.__name__} treats LoRA's factors A and B differently, but those of a hyperadapter are no "
                "parameters: its hypernetwork generates them. Make an optimizer of all trainable parameters, such as "
                "torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)."
            )
        return create(model, *args, **kwargs)

    return create_for_lora
