"""What the environment says of the adapters that a server may serve."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path

from hyperadapt.config.checks import shown
from hyperadapt.config.task_fields import check_description

_PREFIX = "HYPERADAPT_LORA_RESOLVER_"
ADAPTERS, DESCRIPTIONS = f"{_PREFIX}ADAPTERS", f"{_PREFIX}DESCRIPTIONS"
BASE_MODEL, CACHE_DIR, CACHE_GB = f"{_PREFIX}BASE_MODEL", f"{_PREFIX}CACHE_DIR", f"{_PREFIX}CACHE_GB"
_DEFAULT_CACHE_GB = "20"


@dataclass(frozen=True)
class Settings:
    """The adapters by the names that requests use, what they may be asked for beside their tasks, and where LoRAs lie.

    ``adapters`` maps to a folder or a repository, ``descriptions`` a name to texts; ``base_model`` is what the adapters
    call the served model, if the server calls it otherwise.
    """

    adapters: dict[str, str]
    descriptions: dict[str, str | list[str]]
    base_model: str | None
    cache_dir: Path
    cache_bytes: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """The settings; None where no adapters are named."""
        adapters = _adapters(environment.get(ADAPTERS, ""))
        if not adapters:
            return None
        cache_dir = environment.get(CACHE_DIR)
        return cls(
            adapters,
            _descriptions(environment.get(DESCRIPTIONS)),
            environment.get(BASE_MODEL) or None,
            Path(cache_dir).expanduser().absolute() if cache_dir else cached_assets_path("hyperadapt", "loras"),
            _cache_bytes(environment.get(CACHE_GB) or _DEFAULT_CACHE_GB),
        )


def _adapters(value: str) -> dict[str, str]:
    """By name what ``name=folder,user/repository`` says."""
    adapters: dict[str, str] = {}
    for entry in filter(None, map(str.strip, value.split(","))):
        name, separator, address = map(str.strip, entry.partition("="))
        address = address if separator else name
        if not (name and address) or name.startswith(("/", ".", "~")) or name.endswith("/"):
            raise ValueError(
                f"{ADAPTERS} holds {shown(entry)}. Write name=folder, name=user/repository or user/repository, with "
                "commas between them; requests ask for name/task."
            )
        if name in adapters:
            raise ValueError(f"{ADAPTERS} names {shown(name)} more than once. Give every adapter its own name.")
        # Shells do so only after the first "=".
        adapters[name] = os.path.expanduser(address)
    return adapters


def _descriptions(path: str | None) -> dict[str, str | list[str]]:
    if not path:
        return {}
    try:
        descriptions = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(descriptions, dict):
            raise ValueError(f"it holds {shown(descriptions)}")
        for name, description in descriptions.items():
            check_description(name, description)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{DESCRIPTIONS}={path!r} is no JSON file with a dict from name to description ({error})."
        ) from error
    return descriptions


def _cache_bytes(value: str) -> int:
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"{CACHE_GB}={value!r} must be a number above 0, in units of 10^9 bytes.")
    return int(size * 1e9)
