"""Commands in this process, and what they print."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hyperadapt_cli as cli


class CommandLine:
    """Runs commands in this process.

    Args:
        monkeypatch: Sets the arguments.
        capsys: Reads what is printed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.stderr = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """The standard output of a command that ends with an exit code."""
        self.monkeypatch.setattr("sys.argv", ["hyperadapt", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        output = self.capsys.readouterr()
        self.stderr = output.err
        assert (exit_info.value.code or 0) == code, output.err + output.out
        return output.out

    def json(self, *arguments: object, code: int = 0) -> Any:
        """What a command prints for machines, which is nothing but one JSON object."""
        return json.loads(self(*arguments, "--json", code=code))
