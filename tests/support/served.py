"""Adapters as servers serve them."""

from pathlib import Path
from typing import Any

import hyperadapt.serving.settings
from hyperadapt.serving.adapter import ServedAdapter
from hyperadapt.serving.cache import LoraCache
from hyperadapt.serving.settings import Settings
from tests.support.helpers import adapted_model

BASE = "user/base"
PREFIX = "HYPERADAPT_LORA_RESOLVER_"
# The variables of the environment that are read.
SETTINGS = {
    value
    for value in vars(hyperadapt.serving.settings).values()
    if isinstance(value, str) and value.startswith(PREFIX) and value != PREFIX
}


def saved_adapter(folder: Path, base: str | None = BASE, **changes: Any) -> Path:
    """The folder of an adapter that was made for a base model of some name."""
    model = adapted_model("llama", **changes)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def served(folder: Path, address: object, **settings: str) -> ServedAdapter:
    """An adapter that is served as "two", with its LoRAs in ``folder/cache``."""
    values = {"ADAPTERS": f"two={address}", "CACHE_DIR": str(folder / "cache"), **settings}
    found = Settings.read({PREFIX + key: value for key, value in values.items()})
    assert found is not None
    return ServedAdapter("two", found.adapters["two"], found, LoraCache(found.cache_dir, found.cache_bytes))


def cached(folder: Path) -> list[Path]:
    """The folders in the cache."""
    return sorted(path for path in (folder / "cache").glob("*") if path.is_dir())
