"""Checks of configuration fields. Every message names the field and the value, the cause and the remedy."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, TypeVar

# Far above anything useful: they keep a number in a file from asking for any amount of memory or time.
MAX_SIZE = 65536
MAX_DEPTH = 256
MAX_ITERATIONS = 1000
# The square of a larger one could overflow, which Python raises as an OverflowError.
MAX_NUMBER = 1e30

# What users of other libraries call these fields.
OTHER_NAMES = {"lora_r": "r", "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}

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
    """A value as it appears in messages: its ``repr``, abbreviated if long."""
    return _abbreviation.repr(value)


def check_integer(name: str, value: Any, maximum: int = MAX_SIZE) -> None:
    """Check for an integer from 1 to a maximum."""
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
    """Check for a finite number of a sane size that has a property: whether it `holds`, and the `rule` in words."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={shown(value)} must be a number, not {type(value).__name__}.")
    # Not math.isfinite, which fails for an integer that no float can hold.
    if not (abs(value) < math.inf and holds(value)):
        raise ValueError(f"{name}={shown(value)} must be {rule}.")
    if value > MAX_NUMBER:
        raise ValueError(f"{name}={shown(value)} must be at most {MAX_NUMBER:g}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check for one of some values; 1 is not True."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name}={shown(value)} is unknown. Choose one of {', '.join(map(repr, choices))}.")


def check_type(name: str, value: Any, kind: type | UnionType, description: str, *, optional: bool = True) -> None:
    """Check for a type, or None where that is allowed; the description is the type in words."""
    if not isinstance(value, kind) and not (optional and value is None):
        none = " or None" if optional else ""
        raise TypeError(f"{name}={shown(value)} must be {description}{none}, not {type(value).__name__}.")


def checked_names(name: str, value: Any) -> list[str]:
    """The names of a list, tuple or set, which are non-empty strings."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError(f"{name}={shown(value)} must be a list of names, not {type(value).__name__}.")
    for entry in value:
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(f"{name}={shown(value)} holds {shown(entry)}; every entry needs to be a non-empty string.")
    return list(value)


def suggestion(name: str, known: Iterable[str], synonyms: Mapping[str, str] = OTHER_NAMES) -> str:
    """What may have been meant by an unknown name: a question with a space before it, or nothing."""
    close = [synonyms[name]] if name in synonyms else difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def refuses_unknown_fields(config_class: Class) -> Class:
    """Have a subclass of ``PeftConfig`` refuse the unknown fields of a file, which PEFT would drop with a warning.

    A field that a newer version added may change what the adapter computes. Objects know by `is_from_file` whether they
    come from one.
    """
    construct = config_class.__init__  # type: ignore[misc]
    known = inspect.signature(construct).parameters

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        # It comes along where the attributes of one object make another.
        kwargs.pop("is_from_file", None)
        unknown = [name for name in kwargs if name not in known]
        # A file names its method. Without that it is a call.
        if unknown and "peft_type" not in kwargs:
            raise TypeError(
                f"{config_class.__name__} got an unexpected keyword argument {unknown[0]!r}."
                f"{suggestion(unknown[0], known)}"
            )
        if unknown:
            raise ValueError(
                f"{config_class.__name__} has no field {', '.join(map(shown, unknown[:8]))}. The file was saved by a "
                "newer hyperadapt or peft: upgrade them, or remove the field from adapter_config.json."
            )
        self.is_from_file = "peft_type" in kwargs
        construct(self, *args, **kwargs)

    config_class.__init__ = checked  # type: ignore[misc]
    return config_class
