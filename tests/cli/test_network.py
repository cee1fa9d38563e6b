"""What goes wrong on the way to the Hub is told in a line, for people and for machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import CommandLine
from tests.support.hub_server import HubServer
from tests.support.tiny_runs import write_recipe


def only_error(hyperadapt: CommandLine, *arguments: object) -> str:
    """The message of a command that fails, which is one line and the same for machines."""
    error = hyperadapt.json(*arguments, code=1)["error"]
    [line] = [line for line in hyperadapt.stderr.splitlines() if line.startswith("error: ")]
    assert hyperadapt.stderr.endswith(f"{line}\n")
    assert line == f"error: {error['message']}"
    return str(error["message"])


@pytest.mark.parametrize("command", ["diagnose", "evaluate"])
def test_a_name_that_the_hub_does_not_know(hyperadapt: CommandLine, hub: HubServer, command: str) -> None:
    message = only_error(hyperadapt, command, "user/nowhere")
    assert "Repository Not Found" in message
    assert "cannot be reached" not in message


@pytest.mark.parametrize("command", ["diagnose", "evaluate"])
def test_no_connection(hyperadapt: CommandLine, hub: HubServer, command: str) -> None:
    hub.fail("GET", "/api/models/.*", cut="request", times=float("inf"))
    message = only_error(hyperadapt, command, "user/first")
    assert message.startswith("The Hub cannot be reached. Check the connection. ")


def test_a_base_model_that_is_not_there(hyperadapt: CommandLine, hub: HubServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "SEQ_CLS", {"base_model": "user/nowhere"})
    assert "user/nowhere" in only_error(hyperadapt, "train", recipe)
    assert not (tmp_path / "run").exists()


def test_a_base_model_in_a_folder_that_is_not_there(hyperadapt: CommandLine, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "SEQ_CLS", {"base_model": "data/nowhere"})
    hyperadapt("train", recipe, code=2)
    assert f"{recipe}:1: base_model='data/nowhere' is neither a folder" in hyperadapt.stderr
