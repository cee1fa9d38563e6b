"""The files around the package: they can be read, and they say the same as what they stand for."""

import re
import tomllib
from typing import Any

import yaml

from tests.support.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_ci_runs_the_readmes_command_and_the_bounds_of_the_versions() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert jobs["checks"]["steps"][-1]["run"] == ".ci/run"
    assert jobs["versions"]["steps"][-1]["run"].startswith("python -m tests.versions ")
    assert {entry["versions"] for entry in jobs["versions"]["strategy"]["matrix"]["include"]} == {"oldest", "newest"}
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert jobs["checks"]["strategy"]["matrix"]["python"][0] == lowest


def test_hooks_run_what_the_checks_run() -> None:
    [repo] = read(".pre-commit-config.yaml")["repos"]
    modules = {hook["entry"].split()[2] for hook in repo["hooks"]}
    assert modules == {"ruff", "mypy", "pydoclint.main"}


def test_every_word_of_make_is_explained() -> None:
    words = re.findall(r"^(\w+):$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(words) == 6
    assert [word for word in words if f"`make {word}`" not in page] == []


def test_the_readme_shows_every_room() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^[├└]── (\w+)(?:/|\.py) ", page, re.MULTILINE))
    found = {path.stem for path in (ROOT / "hyperadapt").iterdir() if path.suffix in ("", ".py")} - {"__pycache__"}
    assert shown == {name for name in found if not name.startswith("__")}
