"""Checks of configuration fields. Every message names the field and the value, the cause and the remedy."""

from __future__ import annotations

import functools
import inspect
import math
import re
import reprlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

# Far above anything useful: they keep a number in a file from asking for any amount of memory or time.
MAX_SIZE = 65536
MAX_DEPTH = 256
MAX_ITERATIONS = 1000
# The square of a larger one could overflow, which Python raises as an OverflowError.
MAX_NUMBER = 1e30

Class = TypeVar("Class", bound=type)


class _Abbreviation(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long integers.
        return repr(x) if x.bit_length() <= 128 else f"<integer of {x.bit_length()} bits>"


_abbreviation = _Abbreviation()


def shown(value: object) -> str:
    """A value as it appears in messages.

    Args:
        value: Anything.

    Returns:
        Its ``repr``, abbreviated if long.
    """
    return _abbreviation.repr(value)


def check_integer(name: str, value: Any, maximum: int = MAX_SIZE) -> None:
    """Check for an integer from 1 to a maximum.

    Args:
        name: The field.
        value: Its value.
        maximum: The largest allowed.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={shown(value)} must be an integer, not {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name}={shown(value)} must be at least 1.")
    if value > maximum:
        raise ValueError(f"{name}={shown(value)} must be at most {maximum}.")


def check_number(
    name: str,
    value: Any,
    rule: str = "a finite number above 0",
    holds: Callable[[float], bool] = lambda value: value > 0,
) -> None:
    """Check for a finite number with a property, and of a sane size.

    Args:
        name: The field.
        value: Its value.
        rule: The property in words.
        holds: Whether a number has the property.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is infinite, lacks the property or is huge.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={shown(value)} must be a number, not {type(value).__name__}.")
    # Not math.isfinite, which fails for an integer that no float can hold.
    if not (abs(value) < math.inf and holds(value)):
        raise ValueError(f"{name}={shown(value)} must be {rule}.")
    if value > MAX_NUMBER:
        raise ValueError(f"{name}={shown(value)} must be at most {MAX_NUMBER:g}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check for one of some values.

    Args:
        name: The field.
        value: Its value.
        choices: What is allowed; 1 is not True.

    Raises:
        ValueError: If it is none of them.
    """
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name}={shown(value)} is unknown. Choose one of {', '.join(map(repr, choices))}.")


def check_type(name: str, value: Any, kind: type, description: str, *, optional: bool = True) -> None:
    """Check for a type.

    Args:
        name: The field.
        value: Its value.
        kind: The type.
        description: The type in words.
        optional: Whether None is allowed.

    Raises:
        TypeError: If it has another type.
    """
    if not isinstance(value, kind) and not (optional and value is None):
        none = " or None" if optional else ""
        raise TypeError(f"{name}={shown(value)} must be {description}{none}, not {type(value).__name__}.")


def check_names(name: str, value: Any) -> list[str]:
    """Check for a collection of names.

    Args:
        name: The field.
        value: Its value.

    Returns:
        The names.

    Raises:
        TypeError: If it is no list, tuple or set.
        ValueError: If it holds anything but non-empty strings.
    """
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError(f"{name}={shown(value)} must be a list of names, not {type(value).__name__}.")
    for entry in value:
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(f"{name}={shown(value)} holds {shown(entry)}; every entry needs to be a non-empty string.")
    return list(value)


def check_expression(name: str, value: str, before: str = "", after: str = "") -> None:
    """Check for a regular expression.

    Args:
        name: The field.
        value: Its value.
        before: What PEFT puts before it.
        after: What PEFT puts after it.

    Raises:
        ValueError: If it is empty or not valid.
    """
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


def check_pattern(name: str, value: Any, check: Callable[[str, Any], None]) -> None:  # noqa: DOC502
    """Check for a dict from module name (or regular expression) to a value, such as `rank_pattern`.

    Args:
        name: The field.
        value: Its value.
        check: Takes the name and the value of an entry.

    Raises:
        TypeError: If it is no dict, or a key is no string.
        ValueError: If a key is empty or no valid regular expression.
    """
    check_type(name, value, dict, "a dict from module name or regular expression to value", optional=False)
    for key, entry in value.items():
        check_type(f"key of {name}", key, str, "a string", optional=False)
        check_expression(f"key of {name}", key, r"(.*\.)?(", ")$")
        check(f"{name}[{shown(key)}]", entry)


def checked_layers(layers: Any, pattern: Any, target_modules: Any) -> list[int] | int | None:
    """Check which layers are adapted.

    Args:
        layers: The field `layers_to_transform`.
        pattern: The field `layers_pattern`.
        target_modules: The field of that name.

    Returns:
        The layers; a list if there are several.

    Raises:
        TypeError: If the layers are no integers.
        ValueError: If a value, or their combination, is impossible.
    """
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
        for value in [pattern] if isinstance(pattern, str) else check_names("layers_pattern", pattern):
            check_expression("layers_pattern", value, r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")
        if pattern and layers is None:
            raise ValueError(
                f"layers_pattern={shown(pattern)} has no effect without layers_to_transform. Pass the layer indices as "
                "layers_to_transform, or drop layers_pattern."
            )
    result: list[int] | int | None = list(layers) if isinstance(layers, tuple | set | range) else layers
    return result


def refuses_unknown_fields(config_class: Class) -> Class:
    """Have a dataclass refuse the unknown fields of a file, which PEFT would drop with a warning.

    A field that a newer version added may change what the adapter computes. Objects know by `is_from_file` whether they
    come from one.

    Args:
        config_class: A subclass of ``PeftConfig``.

    Returns:
        The same class.
    """
    construct = config_class.__init__  # type: ignore[misc]
    known = inspect.signature(construct).parameters

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        # It comes along where the attributes of one object make another.
        kwargs.pop("is_from_file", None)
        unknown = [name for name in kwargs if name not in known]
        # A file names its method. Without that it is a call, and the usual TypeError tells best.
        if unknown and "peft_type" in kwargs:
            raise ValueError(
                f"{config_class.__name__} has no field {', '.join(map(shown, unknown[:8]))}. The file was saved by a "
                "newer hyperadapt or peft: upgrade them, or remove the field from adapter_config.json."
            )
        self.is_from_file = "peft_type" in kwargs
        construct(self, *args, **kwargs)

    config_class.__init__ = checked  # type: ignore[misc]
    return config_class
