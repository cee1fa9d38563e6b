"""Tests of the configuration's normalisation: options of each method, defaults, starts, saving, refusals."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hyperadapt.config import HyperAdapterConfig
from hyperadapt.normalization.formulas import (
    BOUNDED_NORMALIZATIONS,
    METHODS,
    NORMALIZATIONS,
    UNIT_NORMALIZATIONS,
)
from hyperadapt.normalization.methods import OPTIONS, default_bound

# Stated here once more, so that a changed default is noticed. The bound is filled in when the adapter is made.
BOUND, WARMUP = None, 30
DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "soft_frobenius": {"bound": BOUND, "warmup": WARMUP},
    "soft_polar": {"bound": BOUND, "warmup": WARMUP},
    "adaptive": {"bound": BOUND, "warmup": WARMUP},
    "frobenius": {"bound": BOUND},
    "spectral": {"bound": BOUND},
    "whitening": {"ridge": 1e-5, "factors": "both", "bound": BOUND},
    "weight_norm": {"bound": BOUND},
    "sinkhorn": {"iterations": 20, "temperature": 1.0, "bound": BOUND},
}
# One legal value beside the default.
OTHER_VALUES = {"bound": 0.125, "ridge": 1e-3, "factors": "A", "iterations": 7, "temperature": 0.5, "warmup": 5}
BOUNDED = ("soft_frobenius", "soft_polar", "adaptive")
UNIT = ("frobenius", "spectral", "whitening", "weight_norm", "sinkhorn")


def takers(option: str) -> list[str]:
    return [method for method in NORMALIZATIONS if option in METHODS[method].config_options({})]


def test_defaults_and_families_are_as_documented() -> None:
    defaults = {method: HyperAdapterConfig(normalization=method).normalization_options for method in NORMALIZATIONS}
    assert {method: defaults[method] for method in DEFAULTS} == DEFAULTS
    assert set(BOUNDED) <= set(BOUNDED_NORMALIZATIONS)
    assert set(UNIT) <= set(UNIT_NORMALIZATIONS)
    assert sorted(("none", *BOUNDED_NORMALIZATIONS, *UNIT_NORMALIZATIONS)) == sorted(NORMALIZATIONS)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_defaults_are_filled_in_for_the_options_of_the_method_alone(normalization: str) -> None:
    config = HyperAdapterConfig(normalization=normalization)
    filled = {option: getattr(config, f"normalization_{option}") for option in OPTIONS}
    assert filled == dict.fromkeys(OPTIONS) | METHODS[normalization].config_options({})
    assert config.normalization_options == METHODS[normalization].config_options({})


@pytest.mark.parametrize(
    ("positions", "bound"), [(1, 0.2), (6, 0.2), (7, 0.1852), (24, 0.1), (36, 0.0816), (196, 0.035)]
)
def test_the_default_bound_is_smaller_for_more_positions(positions: int, bound: float) -> None:
    """The squares of the bounds of more than six positions add up to those of six."""
    assert default_bound(positions) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_open_bound_is_filled_in_in_a_copy(normalization: str) -> None:
    config = HyperAdapterConfig(normalization=normalization)
    made = config.with_bound(24)
    assert config.normalization_bound is None
    assert made.normalization_bound == (None if normalization == "none" else pytest.approx(0.1))
    assert made.with_bound(6) is made
    assert HyperAdapterConfig(normalization_bound=0.5).with_bound(24).normalization_bound == 0.5
    whitened = HyperAdapterConfig(normalization="whitening", normalization_factors="A")
    assert whitened.with_bound(24) is whitened


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_unit_normalizations_have_a_gain_and_others_zero_heads(normalization: str) -> None:
    is_unit = normalization in UNIT_NORMALIZATIONS
    for init_weights in (True, False, "zero_gain" if is_unit else "zero_head"):
        config = HyperAdapterConfig(normalization=normalization, init_weights=init_weights)
        assert config.has_gain == is_unit
        assert config.has_zero_heads == (bool(init_weights) and not is_unit)


def test_changed_options_do_not_leak_into_other_configs() -> None:
    config = HyperAdapterConfig(normalization="whitening")
    config.normalization_options["ridge"] = 1.0
    assert config.normalization_ridge == 1e-5
    assert HyperAdapterConfig(normalization="whitening").normalization_ridge == 1e-5
    assert HyperAdapterConfig(normalization="whitening").normalization_options == DEFAULTS["whitening"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_saved_config_loads_equal(tmp_path: Path, normalization: str) -> None:
    options = {name: OTHER_VALUES[name] for name in METHODS[normalization].config_options({})}
    if options.get("factors") == "A":
        del options["bound"]
    given = {f"normalization_{name}": value for name, value in options.items()}
    config = HyperAdapterConfig(normalization=normalization, **given)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded == config
    assert loaded.normalization_options == options
    assert [type(value) for value in loaded.normalization_options.values()] == [type(v) for v in options.values()]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("bound", [1, 1e-30, 1e30]),
        ("ridge", [1, 1e-13]),
        ("factors", ["both", "A"]),
        ("iterations", [1, 1000]),
        ("temperature", [1, 1e-3, 100.0]),
    ],
)
def test_legal_values_are_kept(option: str, values: list[Any]) -> None:
    for normalization in takers(option):
        for value in values:
            config = HyperAdapterConfig(normalization=normalization, **{f"normalization_{option}": value})
            assert config.normalization_options[option] == value


@pytest.mark.parametrize(
    ("arguments", "has_gain"),
    [
        ({"normalization": "whitening", "normalization_factors": "A", "init_weights": "zero_head"}, False),
        ({"normalization": "whitening", "normalization_factors": "A"}, False),
        ({"normalization": "whitening", "normalization_factors": "both"}, True),
    ],
    ids=str,
)
def test_starts_that_options_decide(arguments: dict[str, Any], has_gain: bool) -> None:
    config = HyperAdapterConfig(**arguments)
    assert config.has_gain == has_gain
    assert config.has_zero_heads == (not has_gain)


def test_a_random_start_adds_neither_a_gain_nor_zero_heads() -> None:
    config = HyperAdapterConfig(normalization="whitening", normalization_factors="A", init_weights=False)
    assert not config.has_gain
    assert not config.has_zero_heads


# Configuration, exception, and how the message begins: the offending value, the cause and a remedy.
BAD = [
    *(
        ({"normalization": takers(option)[0], name: value}, error, f"{name}={value!r} must be {rule}")
        for option, value, error, rule in (
            ("bound", 0, ValueError, "a finite number above 0."),
            ("bound", True, TypeError, "a number, not bool."),
            ("ridge", math.nan, ValueError, "a finite number above 0."),
            ("ridge", [1.0], TypeError, "a number, not list."),
            ("temperature", math.inf, ValueError, "a finite number above 0."),
            ("temperature", "1", TypeError, "a number, not str."),
            ("iterations", 8.0, TypeError, "an integer, not float."),
            ("iterations", True, TypeError, "an integer, not bool."),
            ("iterations", -2, ValueError, "at least 1."),
            ("iterations", 0, ValueError, "at least 1."),
        )
        for name in [f"normalization_{option}"]
    ),
    *(
        (
            {"normalization": "whitening", "normalization_factors": factors},
            ValueError,
            f"normalization_factors={factors!r} is unknown. Choose one of 'both', 'A'.",
        )
        for factors in ("B", True, ["A"])
    ),
    *(
        (
            {"normalization": normalization, f"normalization_{option}": OTHER_VALUES[option]},
            ValueError,
            f"normalization_{option}={OTHER_VALUES[option]!r} has no effect with normalization={normalization!r}. "
            f"Drop it, or choose one of {', '.join(takers(option))}.",
        )
        for option, normalization in (
            ("bound", "none"),
            ("ridge", "soft_frobenius"),
            ("factors", "spectral"),
            ("iterations", "whitening"),
            ("temperature", "adaptive"),
        )
    ),
    *(
        (
            {"normalization": normalization, "init_weights": "zero_head"},
            ValueError,
            f"init_weights='zero_head' is impossible with normalization={normalization!r}: the unit norm of a zero "
            "matrix is undefined and its gradient is infinite. Use init_weights='zero_gain' (or True), or a bounded "
            f"normalization ({', '.join(BOUNDED_NORMALIZATIONS)}).",
        )
        for normalization in UNIT_NORMALIZATIONS
    ),
    (
        {"normalization": "whitening", "normalization_factors": "A", "normalization_bound": 0.1},
        ValueError,
        "normalization_bound=0.1 has no effect with normalization='whitening' and normalization_factors='A'. Drop it, "
        f"or choose one of {', '.join(taker for taker in takers('bound') if taker != 'whitening')}.",
    ),
    *(
        (
            arguments | {"init_weights": "zero_gain"},
            ValueError,
            f"init_weights='zero_gain' is impossible with {words}, which has no gain. Use init_weights='zero_head' (or "
            f"True), or a unit normalization ({', '.join(UNIT_NORMALIZATIONS)}).",
        )
        for arguments, words in (
            ({"normalization": "none"}, "normalization='none'"),
            ({"normalization": "soft_frobenius"}, "normalization='soft_frobenius'"),
            ({"normalization": "soft_polar"}, "normalization='soft_polar'"),
            ({"normalization": "adaptive"}, "normalization='adaptive'"),
            (
                {"normalization": "whitening", "normalization_factors": "A"},
                "normalization='whitening' and normalization_factors='A'",
            ),
        )
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_options_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        HyperAdapterConfig(**arguments)
