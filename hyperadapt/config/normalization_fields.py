"""The normalisation of a configuration: its options, and where training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyperadapt.config.checks import MAX_ITERATIONS, check_choice, check_integer, check_number, shown
from hyperadapt.normalization.formulas import BOUNDED_NORMALIZATIONS, METHODS, UNIT_NORMALIZATIONS
from hyperadapt.normalization.methods import OPTIONS


def checked_options(normalization: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option by its name: as given, its default where that is None, or None if the normalisation has none."""
    defaults = METHODS[normalization].config_options(given)
    for option in sorted(given):
        value = given[option]
        if value is None:
            continue
        if option in defaults:
            _check_option(option, value)
            continue
        # The chosen one may take the option with other values of its own options, but is no other choice.
        takers = [
            name for name, method in METHODS.items() if name != normalization and option in method.config_options({})
        ]
        raise ValueError(
            f"normalization_{option}={shown(value)} has no effect with {_chosen(normalization, given)}. Drop it, or "
            f"choose one of {', '.join(takers)}."
        )
    return {option: defaults.get(option) if value is None else value for option, value in given.items()}


def _check_option(option: str, value: Any) -> None:
    name, kind, choices = f"normalization_{option}", OPTIONS[option].kind, OPTIONS[option].choices
    if kind is float:
        check_number(name, value)
    elif kind is str:
        check_choice(name, value, choices)
    else:
        check_integer(name, value, MAX_ITERATIONS)


def check_start(init_weights: Any, has_gain: bool, normalization: str, options: Mapping[str, Any]) -> None:
    """Check that training can start as `init_weights` says."""
    check_choice("init_weights", init_weights, (True, False, "zero_head", "zero_gain"))
    if init_weights == "zero_head" and has_gain:
        raise ValueError(
            f"init_weights='zero_head' is impossible with normalization={normalization!r}: the unit norm of a zero "
            "matrix is undefined and its gradient is infinite. Use init_weights='zero_gain' (or True), or a bounded "
            f"normalization ({', '.join(BOUNDED_NORMALIZATIONS)})."
        )
    if init_weights == "zero_gain" and not has_gain:
        raise ValueError(
            f"init_weights='zero_gain' is impossible with {_chosen(normalization, options)}, which has no gain. Use "
            "init_weights='zero_head' (or True), or a unit normalization "
            f"({', '.join(UNIT_NORMALIZATIONS)})."
        )


def _chosen(normalization: str, options: Mapping[str, Any]) -> str:
    """The normalisation, with the options for which it has no gain."""
    causes = [
        f" and normalization_{option}={value!r}"
        for option, value in METHODS[normalization].without_gain.items()
        if options[option] == value
    ]
    return f"normalization={normalization!r}{''.join(causes)}"
