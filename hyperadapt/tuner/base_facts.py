"""What is kept of a base model, for exports and cards that are made without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hyperadapt.config.adapted_fields import AdaptedModel
from hyperadapt.hypernetwork.positions import Position


def base_facts(
    base_model: nn.Module, positions: Sequence[Position], modules_to_save: Sequence[str] = ()
) -> AdaptedModel:
    """The facts of a base model that is adapted at these positions."""
    kind = type(base_model)
    config, dtype = getattr(base_model, "config", None), getattr(base_model, "dtype", None)
    # A backbone may have 0, and somebody's own model anything.
    num_labels = getattr(config, "num_labels", None)
    return AdaptedModel(
        kind=kind.__name__,
        library=_library(kind),
        config=_config_file(base_model) if isinstance(base_model, PreTrainedModel) else None,
        dtype=str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None,
        has_text=hasattr(config, "vocab_size"),
        num_labels=num_labels if isinstance(num_labels, int) and num_labels > 0 else None,
        decoder_layers=_decoder_layers(base_model),
        has_own_endings=_has_own_endings(base_model, {one.name for one in positions if not one.experts}),
        trained_modules=_trained_modules(base_model, modules_to_save),
        embeddings=_embeddings(base_model),
    )


def _library(kind: type[nn.Module]) -> str | None:
    if any(one.__name__ == "ModelMixin" and one.__module__.startswith("diffusers.") for one in kind.__mro__):
        return "diffusers"
    return "transformers" if kind.__module__.startswith("transformers.") else None


def _config_file(base_model: PreTrainedModel) -> dict[str, Any] | None:
    """What the model's config.json would hold, but for a quantisation; None if it cannot be written."""
    try:
        saved: dict[str, Any] = json.loads(base_model.config.to_json_string())
    except (TypeError, ValueError):
        # Somebody keeps tensors in it, say, which hinders nothing but such a file.
        return None
    saved["architectures"] = saved.get("architectures") or [type(base_model).__name__]
    # llama.cpp's converter refuses ways of quantisation that it cannot undo, even though it reads no weights.
    saved.pop("quantization_config", None)
    return saved


def _decoder_layers(base_model: nn.Module) -> int | None:
    try:
        return len(list(base_model.get_submodule("model.layers").children())) or None
    except AttributeError:
        return None


def _trained_modules(base_model: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """The modules that PEFT trains in full: it compares endings, and takes no part of what it has taken."""
    found: list[str] = []
    for path, module in base_model.named_modules():
        if path.endswith(tuple(endings)) and not path.startswith(tuple(f"{one}." for one in found)):
            found += [path] * bool(module.state_dict())
    return tuple(found)


def _embeddings(base_model: nn.Module) -> tuple[str, ...]:
    """The modules that PEFT saves along with some adapters."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # Models without embeddings, such as vision models, may say so by an error.
        with suppress(AttributeError, NotImplementedError):
            found.add(id(getattr(base_model, getter)()))
    named = base_model.named_modules(remove_duplicate=False)
    return tuple(path for path, module in named if id(module) in found)


def _has_own_endings(base_model: nn.Module, names: set[str]) -> bool:
    endings = {name.rpartition(".")[2] for name in names}
    matched = {
        name.removesuffix(".base_layer")
        for name, _ in base_model.named_modules()
        if name.removesuffix(".base_layer").rpartition(".")[2] in endings
    }
    return matched == names
