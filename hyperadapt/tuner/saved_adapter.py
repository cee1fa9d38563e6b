"""An adapter read from its files alone, without the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig, HyperAdapterType
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import positions_of, weight_count
from hyperadapt.tasks.encoders import with_text_vectors
from hyperadapt.tuner.empty_base import made_for
from hyperadapt.tuner.loading import NETWORKS, check_size, listed, mismatch

_NETWORK, _OTHERS = f"base_model.{NETWORKS}", "base_model.model."


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """What an adapter's files hold: its network, on the CPU, and modules trained in full by their names in the file."""

    network: HyperAdapterNetwork
    others: Mapping[str, Tensor]


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter's folder; one that was saved without its positions needs the config.json of its base model.

    Parameters are in float32, as ``PeftModel.from_pretrained`` has them; in float64 where the file has one so.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}. Name a folder that save_pretrained wrote, with weights in safetensors."
            )
    config = _read_config(folder)
    tensors = dict(_read_tensors(folder / SAFETENSORS_WEIGHTS_NAME))
    others = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OTHERS) and ".lora_" not in name}
    if config.adapted_modules is None:
        config = made_for(config, others)
    elif config.adapted_model is None:
        raise ValueError(
            f"{CONFIG_NAME} of {str(folder)!r} tells of the adapted modules, but not of the base model: it has no "
            "adapted_model. Get it again."
        )
    _check_others(config, others, str(folder))
    return SavedAdapter(_made_network(config, tensors, str(folder)), others)


def _check_others(config: HyperAdapterConfig, others: Mapping[str, Tensor], folder: str) -> None:
    """Refuse tensors that a model would refuse: others would go on into LoRAs, and from there into base models."""
    trained, embeddings = config.base_facts.trained_modules, config.base_facts.embeddings
    names = [name.removeprefix(_OTHERS) for name in others]
    missing = [module for module in trained if not any(name.startswith(f"{module}.") for name in names)]
    if missing:
        raise ValueError(
            f"The file of {folder!r} lacks {shown(missing)}, part of modules_to_save={shown(config.modules_to_save)}. "
            "The file is damaged: get it again."
        )
    known = tuple(f"{_OTHERS}{module}." for module in (*trained, *embeddings))
    texts = [f"{shown(name)} is unexpected" for name in others if not name.startswith(known)]
    if texts:
        raise ValueError(f"The weights of {folder!r} do not fit its {CONFIG_NAME}: {listed(texts)}. Get both again.")


def _read_config(folder: Path) -> HyperAdapterConfig:
    where = f"{CONFIG_NAME} of {str(folder)!r}"
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = fields["peft_type"]
        # JSON can hold half a character, which no file could that is made of it.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{where} is no configuration of PEFT ({error!r}). Get it again.") from error
    if kind != HyperAdapterType.HYPERADAPTER.value:
        raise ValueError(f"{where} is of peft_type {shown(kind)}, which is no hyperadapter.")
    config = HyperAdapterConfig.from_pretrained(str(folder))
    assert isinstance(config, HyperAdapterConfig)
    if config.has_examples and config.example_dim is None:
        raise ValueError(f"{where} asks for examples, but has no example_dim, as a saved adapter has. Get it again.")
    # Refuses descriptions without vectors.
    return with_text_vectors(config)[0]


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # Else it would be a window into the file, which may change.
                yield name, file.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Get it again.") from error


def _made_network(config: HyperAdapterConfig, tensors: Mapping[str, Tensor], folder: str) -> HyperAdapterNetwork:
    """The network with its weights, which are complete, fit, and are all that there is."""
    norms, count = tensors.get(f"{_NETWORK}base_norms"), weight_count(config)
    if norms is None or norms.shape != (count,) or not count:
        found = "none" if norms is None else f"base_norms of shape {tuple(norms.shape)}"
        raise ValueError(
            f"{CONFIG_NAME} of {folder!r} tells of {count:,} adapted weights, but its file has the norms of as many "
            f"base weights: {found}. Get both again."
        )
    check_size(config, positions := positions_of(config), sum(map(torch.numel, tensors.values())), "its file")
    with torch.device("meta"):
        network = HyperAdapterNetwork(config, positions, torch.empty(count))
    expected = {f"{_NETWORK}{name}": value for name, value in network.state_dict().items()}
    problems = {
        name: "is unexpected" if name not in expected else mismatch(name, value, expected[name])
        for name, value in tensors.items()
    } | {name: "is missing" for name in expected if name not in tensors}
    texts = [f"{shown(name)} {problem}" for name, problem in problems.items() if problem]
    if texts:
        raise ValueError(f"The weights of {folder!r} do not fit its {CONFIG_NAME}: {listed(texts)}. Get both again.")
    buffers = {f"{_NETWORK}{name}" for name, _ in network.named_buffers()}
    is_double = any(value.dtype == torch.float64 for name, value in tensors.items() if name not in buffers)
    network.load_state_dict(
        {
            name.removeprefix(_NETWORK): value.to(torch.float64 if is_double and name not in buffers else torch.float32)
            for name, value in tensors.items()
        },
        assign=True,
    )
    return network.requires_grad_(False).eval()
