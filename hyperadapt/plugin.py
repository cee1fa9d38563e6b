"""Registration of the method with PEFT."""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from hyperadapt.config.config import HyperAdapterConfig, HyperAdapterType
from hyperadapt.tuner.model import HyperAdapterModel


def register() -> None:
    """Make PEFT know the method; harmless if done again.

    PEFT's ``register_peft_method`` takes only members of its closed ``PeftType`` enum, so the three
    mappings it fills are filled here, with a type of our own.

    Raises:
        RuntimeError: If another package has taken the name or the prefix.
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
