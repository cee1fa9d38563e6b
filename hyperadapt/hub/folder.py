"""What a folder may hold to be published: the files that go, and whether they are damaged."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from hyperadapt.cards.card import CARD
from hyperadapt.config.checks import shown

# Of PEFT, of MLX and of diffusers.
_LAYOUTS = (
    (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    (CONFIG_NAME, "adapters.safetensors"),
    ("pytorch_lora_weights.safetensors",),
)
# What only a run needs that goes on; the arguments of a training may hold a token.
_LEFT_OUT = (
    "checkpoint-*",
    "global_step*",
    "optimizer.*",
    "optimizer_*",
    "rng_state*",
    "scaler.*",
    "scheduler.*",
    "training_args.bin",
    "*.tmp",
)
_RESULTS = ".eval_results"


def checked_files(folder: Path) -> dict[str, Path]:
    """The files to publish by their names in the folder; an error if they are no adapter or damaged."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_published(path.relative_to(folder))
    }
    if not any(files.keys() >= set(layout) for layout in _LAYOUTS):
        layouts = "; or ".join(" and ".join(layout) for layout in _LAYOUTS)
        raise ValueError(
            f"The folder {str(folder)!r} holds no adapter: it must have {layouts}. Pass a folder that save_pretrained, "
            "a trainer or an export wrote."
        )
    for name, path in files.items():
        if path.suffix == ".safetensors":
            _check_weights(path)
        elif path.name == CONFIG_NAME:
            _check_config(path)
        elif name == CARD:
            _check_card(path)
    return files


def _is_published(path: PurePath) -> bool:
    hidden = any(part.startswith(".") and part != _RESULTS for part in path.parts)
    return not hidden and not any(fnmatchcase(part, pattern) for part in path.parts for pattern in _LEFT_OUT)


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            is_empty = not file.keys()
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Save or export the adapter again.") from error
    if is_empty:
        raise ValueError(f"{str(path)!r} holds no tensors. Save or export the adapter again.")


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Save or export the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds {shown(config)} instead of a dict. Save or export the adapter again.")


def _check_card(path: Path) -> None:
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        base = card.data.get("base_model") or []
        for name in base if isinstance(base, list) else [base]:
            validate_repo_id(name)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of {str(path)!r} cannot be published ({error}). Correct them; base_model is the base "
            "model's name on the Hub, or is left out."
        ) from error
