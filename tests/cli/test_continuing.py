"""``train --continue`` on the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hyperadapt.runs import load_run
from tests.support.command_line import CommandLine
from tests.support.tiny_runs import contents, labelled_rows, recipe, silent, training, write_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside a file of a new task; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    silent(recipe(folder, **training(max_steps=4)))
    write_rows(folder / "new.jsonl", labelled_rows(12, 1, {"a": "positive", "b": "negative"}))
    (folder / "more.yaml").write_text("steps: 6\ntasks:\n  new: {train: new.jsonl}\n", encoding="utf-8")
    return folder / "run"


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, trained.parent / tmp_path.name))


def test_an_adapter_learns_on(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    before, file = contents(adapter), adapter.parent / "more.yaml"
    lines = hyperadapt("train", "--continue", adapter, "--add", file, "--output", tmp_path / "second").splitlines()
    assert contents(adapter) == before
    assert lines[0].startswith("new, on its own 12 examples: accuracy ")
    assert lines[-1] == f"4 tasks, saved to {tmp_path / 'second'}"
    assert load_run(tmp_path / "second").recipe.adapter_config.task_names == ["reviews", "letters", "mail", "new"]
    exact = tmp_path / "exact.yaml"
    exact.write_text(f"keep: exact\n{file.read_text().replace('new.jsonl', str(adapter.parent / 'new.jsonl'))}")
    result = hyperadapt.json("train", "--continue", adapter, "--add", exact)
    assert (result["folder"], result["tasks"]) == (str(adapter), ["reviews", "letters", "mail", "new"])
    [added] = result["added"]
    assert (added["name"], added["old_tasks"], added["examples"]["rows"]) == ("new", {}, 12)
    assert added["trained"]
    assert load_run(adapter).recipe.adapter_config.own_factors == ["new"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Name a recipe, or a trained adapter with --continue and its new tasks with --add."),
        (["--continue", "ADAPTER"], "--continue needs --add FILE: the one names what learns on, the other its new"),
        (["--add", "MORE"], "--add needs --continue ADAPTER: the one names what learns on, the other its new tasks."),
        (
            ["MORE", "--continue", "ADAPTER", "--add", "MORE", "--resume"],
            "--continue does not go with RECIPE, --resume. Leave out the one or the other.",
        ),
        (["--continue", "me/first", "--add", "MORE"], "'me/first' is a name on the Hub. Name a folder to write to"),
    ],
)
def test_what_cannot_be_read_is_misuse(
    hyperadapt: CommandLine, trained: Path, options: list[str], message: str
) -> None:
    names = {"ADAPTER": str(trained), "MORE": str(trained.parent / "more.yaml")}
    assert hyperadapt("train", *(names.get(one, one) for one in options), code=2) == ""
    assert message in re.sub(r"[\s│╭╮╰╯─]+", " ", hyperadapt.stderr)


def test_a_wrong_file_changes_nothing(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    before, file = contents(adapter), tmp_path / "wrong.yaml"
    file.write_text("tasks:\n  mail: {description: Tell a.}\n")
    assert hyperadapt("train", "--continue", adapter, "--add", file, code=2) == ""
    assert f"{file}:2: tasks.mail: the adapter already has a task 'mail'." in hyperadapt.stderr
    assert contents(adapter) == before
