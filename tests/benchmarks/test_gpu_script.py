"""The script for a GPU says what its commands understand; nothing of it is run here."""

import argparse
import importlib
import importlib.util
import re
import shlex
from typing import Any

import pytest

from benchmarks.speed import __main__ as speed
from benchmarks.speed.arms import MODES
from tests.support.helpers import ROOT

TEXT = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8").replace("\\\n", " ")
# Name, seconds, and the command.
STEPS = [shlex.split(line)[1:] for line in TEXT.splitlines() if re.match(r"step [a-z]", line)]


def main_module(name: str) -> Any:
    """What `python -m name` runs: the module, or a package's `__main__`."""
    spec = importlib.util.find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if is_package else name)


class ParsedError(Exception):
    """The benchmark was about to start."""


def parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a benchmark makes of its command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse_args(parser))

    assert command[:2] == ["python", "-m"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", command[2:])
    with pytest.raises(ParsedError) as caught:
        main_module(command[2]).main()
    return caught.value.args[0]


def test_all_steps_together_take_less_than_ten_minutes() -> None:
    assert [name for name, *_ in STEPS] == ["tests", "cores", "large", "small", "half-billion"]
    assert sum(int(seconds) for _, seconds, *_ in STEPS) <= 590


def test_the_first_step_runs_the_tests_for_a_gpu() -> None:
    command = STEPS[0][2:]
    assert command[:5] == ["python", "-m", "pytest", "-m", "gpu"]


@pytest.mark.parametrize("step", STEPS[1:], ids=lambda step: step[0])
def test_benchmarks_understand_their_commands(step: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, *command = step
    assert str(parse(command, monkeypatch).output) == f"$folder/{name}"


def test_a_step_is_measured_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = []
    for _, _, *command in STEPS:
        if command[2] != "benchmarks.speed":
            continue
        options = parse(command, monkeypatch)
        (number,) = options.only
        scenario = speed.SCENARIOS[number]
        bases.append(scenario.base)
        assert scenario.tasks == scenario.batch == 16
        assert {"training", "forward"} <= {*options.measures} & {*scenario.measures}
        assert set(scenario.modes) & set(options.modes) == set(MODES)
    assert bases == ["qwen-4x256", "qwen2.5-0.5b"]
