"""How commands start: help and wrong usage at once, and nothing but the program's own words."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import typer
from transformers.utils import logging

import hyperadapt_cli as cli
from hyperadapt_cli.output import own_words_only
from tests.support.command_line import CommandLine
from tests.support.helpers import ROOT
from tests.support.tiny_runs import write_recipe

# Runs commands one after the other, and says which of the slow modules are there then.
CODE = """
import io, sys, contextlib
import hyperadapt_cli
for arguments in {arguments}:
    sys.argv = ["hyperadapt", *arguments]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        hyperadapt_cli.main()
print([name for name in ("torch", "transformers", "peft", "huggingface_hub", "hyperadapt") if name in sys.modules])
"""
COMMANDS = [command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)


def test_help_and_wrong_usage_load_nothing_that_takes_long() -> None:
    arguments = [[], ["--help"], ["--version"], ["nonsense"], *([name, "--help"] for name in COMMANDS)]
    arguments += [[name] for name in COMMANDS if name != "doctor"]
    arguments += [["evaluate", "nowhere"], ["evaluate", "user/name", "--split", "x"], ["export", "user/name", "out"]]
    arguments += [["add-task", "user/name", "x"], ["generate", "user/name", "out"], ["init", "pyproject.toml", "--x"]]
    arguments += [["train", "pyproject.toml", "--resume", "--overwrite"]]
    assert run(CODE.format(arguments=arguments)).stdout == "[]\n"


def test_help_shows_defaults_in_words_and_breaks_lines_where_the_terminal_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    hyperadapt = CommandLine(monkeypatch, capsys)
    started, added = hyperadapt("init", "--help"), hyperadapt("add-task", "--help")
    # What stands in square brackets in a help text is taken for a colour, and left out.
    assert "its folder. [default: (a small one)]" in started
    assert [text for text in ("(those of the examples)", "(the recipe's)", "(100)") if text not in added] == []
    assert "trec_train.csv and trec_test.csv, are the splits" in started
    assert "evaluate [OPTIONS] [ADAPTER]" in hyperadapt("evaluate", "--help")


def test_arguments_have_names_in_capitals_without_brackets() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    names = {
        one.metavar for command in commands.values() for one in command.params if one.param_type_name == "argument"
    }
    assert names == {"ADAPTER", "DATA", "FILE-OR-TEXT", "FOLDER", "NAME", "OUTPUT", "RECIPE", "USER/NAME"}


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert CommandLine(monkeypatch, capsys)("--version") == f"hyperadapt {version('hyperadapt')}\n"


def test_the_installed_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert {name: EntryPoint(name, value, "").load() for name, value in scripts.items()} == {"hyperadapt": cli.main}


def test_the_standard_error_holds_nothing_of_other_libraries(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "SEQ_CLS")
    result = run("import hyperadapt_cli; hyperadapt_cli.main()", "train", recipe, "--dry-run")
    base = f"loading the base model {tmp_path / 'base'}"
    assert result.stderr.splitlines() == [f"reading {recipe}", "reading the data of 3 tasks", base]


def test_own_warnings_are_told_and_those_of_others_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    source = "import warnings\ndef warn(text, kind):\n    warnings.warn(text, kind, stacklevel=2)\n"
    own, other = {"__name__": "hyperadapt.some.room"}, {"__name__": "torch.nn"}
    for namespace in (own, other):
        exec(source, namespace)
    with warnings.catch_warnings(), own_words_only(["--split"]):
        warnings.simplefilter("always")
        own["warn"]("split='a' has no rows.", UserWarning)
        own["warn"]("will change", FutureWarning)
        other["warn"]("foreign", UserWarning)
        logging.get_logger("hyperadapt.trainer").warning("diverged")
        logging.get_logger("transformers.x").warning("foreign")
        logging.get_logger("transformers.x").error("broken")
    text = capsys.readouterr().err
    assert text.splitlines()[:2] == ["warning: --split 'a' has no rows.", "warning: diverged"]
    assert "foreign" not in text
    assert "will change" not in text
