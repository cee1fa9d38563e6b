"""Adapters from files: limits on their size, a check of their weights, and nothing left behind by a failed load."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from types import FrameType
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.model_state import ModelState

# Of parameters, unless the base model is large.
MAX_PARAMETERS = 2**30
# A narrower float needs scales that the file does not hold.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN_PROBLEMS = 5
NETWORKS = "hyperadapter_networks."
_RESIZED = "has shape"
_TO_LEAVE_OUT = "_to_leave_out"


def check_size(config: HyperAdapterConfig, positions: Sequence[Position], size: int, measure: str) -> None:
    """Refuse a network, or one task's adapters, far larger than a measure of some size, before memory is taken."""
    limit = max(MAX_PARAMETERS, 4 * size)
    generated = sum(p.weights * p.r * (p.in_features + p.out_features + p.r) for p in positions)
    if generated > limit:
        raise ValueError(
            f"One task's adapters would hold {generated:,} numbers, more than the limit of {limit:,} (2**30, or 4 "
            f"times {measure}). Reduce r or rank_pattern, or leave modules out with exclude_modules."
        )
    with torch.device("meta"):
        network = HyperAdapterNetwork(config, positions, torch.empty(sum(p.weights for p in positions)))
    sizes: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        part = next(
            (part for part in ("own_factors", "heads", "shared", "trunk", "task_embedding") if f"{part}." in name),
            "inputs",
        )
        sizes[part] += parameter.numel()
    if network.task_embedding.has_text:
        sizes["descriptions"] = network.task_embedding.text_vectors.numel()
    if network.task_embedding.has_examples:
        sizes["examples"] = network.task_embedding.example_rows.vectors.numel()
    if sizes.total() > limit:
        fields = {
            "heads": "r, rank_pattern or hypernetwork_dim, or choose head='row'",
            "shared": "r or rank_pattern, or leave modules out with exclude_modules",
            "own_factors": "r, or the number of tasks in own_factors",
            "trunk": "hypernetwork_dim or hypernetwork_depth",
            "task_embedding": "task_embedding_dim or the number of tasks",
            "descriptions": "text_embedding_dim or the number of descriptions",
            "examples": "example_dim, example_classes or the number of tasks with examples",
            "inputs": "task_embedding_dim or hypernetwork_dim",
        }
        [(part, size)] = sizes.most_common(1)
        raise ValueError(
            f"The network would have {sizes.total():,} parameters, more than the limit of {limit:,} (2**30, or 4 times "
            f"{measure}), {size:,} of them in {part}. Reduce {fields[part]}."
        )


def check_saved_modules(base_model: nn.Module, adapter_name: str) -> None:
    """Refuse a module of `modules_to_save` inside of which modules are adapted.

    PEFT leaves modules out of adapting by whole components of their names, but saves all whose names end with an entry.
    """
    for path, module in base_model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        for name, inner in module.original_module.named_modules():
            if isinstance(inner, HyperAdapterLayer):
                raise ValueError(
                    f"modules_to_save takes in {path!r}, whose part {name!r} is adapted, too. PEFT takes every module "
                    "whose name ends with an entry of modules_to_save: write a longer ending, or take the part out of "
                    "target_modules."
                )


def checked_state_dict(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Any], renamed: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The weights under the names and in the dtypes of the model, if they are complete, fit, and are the adapter's own.

    ``state_dict`` has the names of the file, ``renamed`` those of the model. Tensors outside of the network may have
    other sizes: PEFT leaves those out next if it is told to, and only then; ``check_left_out`` looks.
    """
    expected = model.state_dict()
    marker = f"{NETWORKS}{adapter_name}."
    own = [name for name in expected if marker in name]
    # Where only one process reads the file, the others pass nothing.
    if not own or not state_dict:
        return dict(renamed)
    # Renaming lets such a name through, to whichever adapter it names.
    problems = [f"{shown(name)} is unexpected" for name in state_dict if NETWORKS in name and name in expected]
    others = other_names(model, adapter_name)
    resized = {}
    for name, value in renamed.items():
        known = expected.get(name) if marker in name or name in others else None
        problem = "is unexpected" if known is None else mismatch(name, value, known)
        if problem.startswith(_RESIZED) and name in others:
            resized[name] = problem
        elif problem:
            problems.append(f"{shown(name.replace(marker, NETWORKS))} {problem}")
    problems += [f"{shown(name.replace(marker, NETWORKS))} is missing" for name in own if name not in renamed]
    if problems:
        raise _unfitting(adapter_name, problems)
    tuner = next(one for one in model.modules() if isinstance(one, BaseTuner))
    vars(tuner)[_TO_LEAVE_OUT] = adapter_name, resized
    # Loaded by assignment, tensors of several dtypes would meet in one product.
    return {name: value.to(expected[name].dtype) for name, value in renamed.items()}


def check_left_out(tuner: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse, before the first is loaded, tensors whose sizes ``checked_state_dict`` has just found to differ."""
    adapter_name, resized = vars(tuner).pop(_TO_LEAVE_OUT, ("", {}))
    problems = [f"{shown(name)} {problem}" for name, problem in resized.items() if name in state_dict]
    if problems:
        raise _unfitting(adapter_name, problems)


def listed(problems: Sequence[str]) -> str:
    """The first of some problems, and how many more there are."""
    rest = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"{'; '.join(problems[:_SHOWN_PROBLEMS])}{rest}"


def _unfitting(adapter_name: str, problems: Sequence[str]) -> ValueError:
    remedy = "if it was, the file is damaged: get it again."
    if any(_RESIZED in problem for problem in problems):
        remedy += (
            " With ignore_mismatched_sizes=True, tensors of other sizes keep the base model's values, but for those of "
            "the network, all of which are needed."
        )
    return ValueError(
        f"The weights for adapter {adapter_name!r} do not fit its configuration and this base model: "
        f"{listed(problems)}. Load the adapter with its own adapter_config.json on the base "
        f"model it was made for; {remedy}"
    )


def weights_follow() -> bool:
    """Whether ``PeftModel.from_pretrained`` is making a model, whose weights it loads next."""
    from_pretrained = PeftModel.from_pretrained.__func__.__code__  # type: ignore[attr-defined]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not from_pretrained:
        frame = frame.f_back
    return frame is not None


def load_adapter(model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """``PeftModel.load_adapter``, and on an error the model as it was before."""
    # PeftModel.from_pretrained adds the adapter itself and then loads it; any other caller has a use for the adapter.
    before: ModelState | None = vars(model.base_model).pop("before_loading", None)
    if before is None and adapter_name not in model.peft_config:
        before = ModelState(model)
    try:
        if adapter_name in model.peft_config:
            _check_tasks(model, model_id, adapter_name, kwargs)
        result = type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)
        missing = [name for name in result.missing_keys if f"{NETWORKS}{adapter_name}." in name]
        if missing:
            raise ValueError(
                f"The file of adapter {adapter_name!r} has no weights of a hyperadapter: {shown(missing)} are missing. "
                "The file is damaged or another one: get it again."
            )
    except Exception as error:
        if before is not None:
            before.restore()
        # PEFT looks up the modules_to_save without a check.
        if isinstance(error, KeyError) and str(error.args[0]).startswith("base_model."):
            raise ValueError(
                f"The file of adapter {adapter_name!r} lacks the tensor {shown(error.args[0])}, part of a module of "
                "modules_to_save. Load it with its own adapter_config.json on the base model it was made for."
            ) from error
        raise
    return result


def _check_tasks(model: PeftModel, model_id: Any, adapter_name: str, options: Mapping[str, Any]) -> None:
    """Refuse weights whose tasks are others, or in another order, than those of the adapter that takes them."""
    saved = PeftConfig.from_pretrained(model_id, **model._split_kwargs(dict(options))[0])
    own = model.peft_config[adapter_name]
    if not isinstance(saved, HyperAdapterConfig) or not isinstance(own, HyperAdapterConfig):
        return
    for index, (theirs, ours) in enumerate(zip_longest(saved.task_names, own.task_names)):
        if theirs != ours:
            raise ValueError(
                f"Task {index} is {theirs!r} in the file of adapter {adapter_name!r}, but {ours!r} in the adapter that "
                "takes its weights, so that tasks would be taken for each other. Give the configuration the file's "
                "tasks in the file's order, or load the file with PeftModel.from_pretrained without config=."
            )
    pairs = zip(own.task_names, saved.embedded_descriptions, own.embedded_descriptions, strict=True)
    for task, theirs, ours in pairs:
        if theirs != ours:
            raise ValueError(
                f"The description of task {task!r} is {shown(theirs)} in the file of adapter {adapter_name!r}, but "
                f"{shown(ours)} in the adapter that takes its weights, among them the vectors of the file's texts. "
                "Give the configuration the file's descriptions."
            )


def other_names(model: nn.Module, adapter_name: str) -> set[str]:
    """What a file may hold besides the network: `modules_to_save`, and embeddings that PEFT saved along."""
    names = set()
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # Models without embeddings, such as vision models, may say so by an error.
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(model, getter)())
    # A copy of a module is equal to nothing, so identity tells.
    identities = {id(layer) for layer in embeddings}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AuxiliaryTrainingWrapper):
            saved = module.adapter_state_dict_load_map(adapter_name)  # type: ignore[no-untyped-call]
            names |= {f"{path}.{name}" for name in saved.values()}
        elif id(module) in identities:
            names |= {f"{path}.{name}" for name in module.state_dict()}
    return names


def mismatch(name: str, value: Any, expected: Tensor) -> str:
    """What is wrong with a value for a tensor of the model; empty if nothing."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return "is no ordinary tensor"
    if value.shape != expected.shape:
        return f"{_RESIZED} {tuple(value.shape)} instead of {tuple(expected.shape)}"
    if value.dtype != expected.dtype and not (value.dtype in DTYPES and expected.is_floating_point()):
        return f"has dtype {value.dtype} instead of {expected.dtype}"
    if NETWORKS in name and name.endswith(".base_norms") and not ((value > 0) & value.isfinite()).all():
        return "holds a norm that is not finite and above 0"
    if NETWORKS in name and name.endswith(".trained_steps") and value < 0:
        return "counts steps below 0"
    if NETWORKS in name and name.endswith(".text_vectors") and not value.isfinite().all():
        return "holds a vector that is not finite"
    if NETWORKS in name and name.endswith((".example_rows.vectors", ".example_encoder.mean")):
        return "" if value.isfinite().all() else "holds a vector that is not finite"
    if NETWORKS in name and name.endswith(".example_encoder.deviation") and not ((value > 0) & value.isfinite()).all():
        return "holds a deviation that is not finite and above 0"
    return ""
