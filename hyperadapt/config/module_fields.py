"""Which modules of the base model are adapted, in which layers, and with which ranks: checks of these fields."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from hyperadapt.config.checks import check_type, checked_names, shown


def check_bias(bias: Any) -> None:
    """Refuse to train biases."""
    if bias != "none":
        raise ValueError(
            f"bias={shown(bias)} is not supported: a hyperadapter generates weights, not biases. Use bias='none'; to "
            "train a module in full, name it in modules_to_save."
        )


def checked_parameters(value: Any, lora_dropout: float) -> list[str] | None:
    """Names of parameters of experts, or None."""
    if value is None:
        return None
    names = checked_names("target_parameters", value)
    for name in names:
        if not name.rpartition(".")[0]:
            raise ValueError(
                f"target_parameters={shown(value)} holds {shown(name)}, the name of a parameter without that of its "
                f"module. Write at least the module's last component before it, such as {shown(f'experts.{name}')}."
            )
    if names and lora_dropout:
        raise ValueError(
            f"lora_dropout={shown(lora_dropout)} cannot be used with target_parameters={shown(value)}: experts get "
            "their input inside of their module, where no dropout can be put before the adapter alone. Set "
            "lora_dropout=0."
        )
    return names or None


def checked_modules(name: str, value: Any) -> set[str] | str | None:
    """Names of modules as a set, or the regular expression that selects them, or None."""
    if isinstance(value, str):
        check_expression(name, value)
        return value
    return None if value is None else set(checked_names(name, value))


def checked_modules_to_save(value: Any) -> list[str] | None:
    """The modules to train in full, in a list of their own: PEFT extends it for some task types."""
    if value is None:
        return None
    names = checked_names("modules_to_save", value)
    for name in names:
        check_expression("modules_to_save entry", name, r"(^|.*\.)", r"($|\..*)")
    return names


def check_expression(name: str, value: str, before: str = "", after: str = "") -> None:
    """Check for a regular expression, also between what PEFT puts before and after it."""
    if not value.strip():
        raise ValueError(f"{name}={shown(value)} is empty. Write a name or a regular expression, or leave it out.")
    try:
        with warnings.catch_warnings():
            # What Python may deprecate in expressions is no error yet.
            warnings.simplefilter("ignore")
            re.compile(f"{before}{value}{after}")
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name}={shown(value)} is not a valid regular expression ({getattr(error, 'msg', error)}). Correct it; "
            "special characters of a name need a backslash."
        ) from None


def check_pattern(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    """Check for a dict from module name or regular expression to a value, whose name and self `check` takes."""
    check_type(name, value, dict, "a dict from module name or regular expression to value", optional=False)
    for key, entry in value.items():
        check_type(f"key of {name}", key, str, "a string", optional=False)
        check_expression(f"key of {name}", key, r"(.*\.)?(", ")$")
        check(f"{name}[{shown(key)}]", entry)


def checked_layers(layers: Any, pattern: Any, target_modules: Any) -> list[int] | int | None:
    """The layers to adapt, as a list if there are several."""
    if layers is not None:
        indices: list[Any] = list(layers) if isinstance(layers, list | tuple | set | range) else [layers]
        if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
            raise TypeError(f"layers_to_transform={shown(layers)} must be a layer index or a list of them.")
        if any(index < 0 for index in indices):
            raise ValueError(f"layers_to_transform={shown(layers)} holds a negative index; count from 0.")
        if isinstance(target_modules, str):
            raise ValueError(
                f"layers_to_transform={shown(layers)} cannot be used with target_modules={shown(target_modules)}: "
                "indices select among listed names. Pass target_modules as a list, or put the layers into the regular "
                "expression."
            )
    if pattern is not None and pattern != "":
        for value in [pattern] if isinstance(pattern, str) else checked_names("layers_pattern", pattern):
            check_expression("layers_pattern", value, r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")
        if pattern and layers is None:
            raise ValueError(
                f"layers_pattern={shown(pattern)} has no effect without layers_to_transform. Pass the layer indices as "
                "layers_to_transform, or drop layers_pattern."
            )
    result: list[int] | int | None = list(layers) if isinstance(layers, tuple | set | range) else layers
    return result


def value_at(field_name: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the patterns that match a module, or the default if none does."""
    matching = {key: value for key, value in patterns.items() if get_pattern_key([key], module) == key}
    if len(set(matching.values())) > 1:
        # PEFT takes the first of them, but saves them in alphabetical order.
        raise ValueError(
            f"{field_name} gives module {module!r} several values: {shown(matching)}. Only one pattern may match a "
            "module, since a file does not keep their order."
        )
    return next(iter(matching.values()), default)
