"""What an installed wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hyperadapt.cards.card import template
from tests.support.helpers import ROOT

CODE = """
import sys, zipfile
sys.path.insert(0, sys.argv[1])
import hyperadapt.cards.card as cards
assert cards.__file__.startswith(sys.argv[1]), cards.__file__
print(cards.template("template.md").read_text(), end="")
"""


def test_templates_of_cards_and_plugins_are_in_the_wheel(tmp_path: Path) -> None:
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    [wheel] = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [plugins] = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
        archive.extractall(tmp_path / "installed")
    assert {
        "hyperadapt/cards/templates/template.md",
        "hyperadapt/cards/templates/lora_template.md",
        "hyperadapt/py.typed",
        "hyperadapt_cli/__init__.py",
    } <= set(names)
    assert "[vllm.general_plugins]\nhyperadapt = hyperadapt.serving.resolver:register\n" in plugins
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/", "docs/", "model_cards/")) for name in names)
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path / "installed")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert output == template("template.md").read_text()
