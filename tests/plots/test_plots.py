"""Pictures as files: what is written, and what stays as it was."""

import ast
import importlib
import random
import re
import struct
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tests.support.helpers import ROOT, adapted_model, snapshot, two_adapters

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure  # noqa: E402

from hyperadapt.plots import draw, plot  # noqa: E402

NAMES = ["task_map", "singular_values", "update_norms", "cosines", "training"]
HISTORY = [{"loss": 2.0 - step, "grad_norm": 1.0 + step, "loss_alpha": 1.0, "step": step} for step in (0, 1)]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_names_of_any_kind_are_shown(tmp_path: Path) -> None:
    names = ["$x^2$", "_hidden", "two\nlines", "日本語", "a" * 30 + "b" * 30, "a$"]
    model = adapted_model("llama", tasks=names, target_modules=["q_proj"])
    history = [{"loss": 1.0, "step": 1} | {f"loss_{name}": 1.0 for name in names}]
    figures = draw(model, log_history=history)
    shown = [r"\$x^2\$", " _hidden", "two lines", "日本語", "a" * 14 + "…" + "b" * 13, r"a\$"]
    assert [label.get_text() for label in figures["cosines"].axes[0].get_yticklabels()] == shown
    legend = figures["training"].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [*shown, "all rows"]
    assert len(plot(model, tmp_path, log_history=history, formats=["png"])) == 5


def test_files_are_the_same_whenever_they_are_written(tmp_path: Path) -> None:
    first = plot(adapted_model("llama"), tmp_path / "first" / "new", log_history=HISTORY)
    assert first == [tmp_path / "first" / "new" / f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    assert set(first) == set((tmp_path / "first" / "new").iterdir())
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        second = plot(adapted_model("llama"), str(tmp_path / "second"), log_history=HISTORY)
    for path, other in zip(first, second, strict=True):
        assert path.read_bytes() == other.read_bytes(), path.name
        if path.suffix == ".png":
            assert struct.unpack(">I", path.read_bytes()[16:20]) == (1200,)
            assert b"Software" not in path.read_bytes()
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            assert b"dc:date" not in path.read_bytes()
            assert matplotlib.__version__.encode() not in path.read_bytes()


def test_only_its_own_files_are_replaced(tmp_path: Path) -> None:
    model = adapted_model("llama", target_modules=["q_proj"])
    for name in ("README.md", "training.svg", "cosines.svg", "cosines.png"):
        (tmp_path / name).write_text("mine")
    plot(model, tmp_path, tasks=["alpha", "beta"], formats=("svg", "svg"))
    texts = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name, text in texts.items() if text == b"mine"} == {"README.md", "training.svg", "cosines.png"}
    assert texts.keys() == {
        "README.md",
        "training.svg",
        "cosines.png",
        "cosines.svg",
        "singular_values.svg",
        "update_norms.svg",
    }


def test_a_failure_while_saving_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model("llama", target_modules=["q_proj"])
    (tmp_path / "task_map.png").write_text("mine")
    save = Figure.savefig

    def fail(self: Figure, path: Path, **options: Any) -> None:
        if path.stem == "update_norms":
            raise OSError("disk full")
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot(model, tmp_path, formats=["png"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("task_map.png", "mine")]


def test_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither imported nor used: it would choose a backend for the whole process.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    model = adapted_model("llama", lora_dropout=0.5, target_modules=["q_proj"]).train()
    model.set_task("beta")
    before, settings = snapshot(model), dict(matplotlib.rcParams.copy())
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    plot(model, tmp_path, log_history=HISTORY, formats=["svg"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert dict(matplotlib.rcParams.copy()) == settings
    assert model.training
    assert model.base_model.router.pinned == {"default": "beta"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_calls_write_nothing(tmp_path: Path) -> None:
    model, folder = two_adapters(), tmp_path / "pictures"
    with pytest.raises(ValueError, match=re.escape("formats='gif' is unknown. Choose one of 'png', 'svg'.")):
        plot(model, folder, formats=["png", "gif"])
    with pytest.raises(TypeError, match="formats='png' must be a list of names, not str"):
        plot(model, folder, formats="png")
    with pytest.raises(ValueError, match=re.escape("formats=() is empty")):
        plot(model, folder, formats=())
    with pytest.raises(ValueError, match="Unknown task 'delta'"):
        plot(model, folder, tasks=["delta"])
    with pytest.raises(TypeError, match="tasks='alpha' must be a list of task names"):
        plot(model, folder, tasks="alpha")
    with pytest.raises(TypeError, match=re.escape("log_history=[7] must be a list of dicts")):
        plot(model, folder, log_history=[7])
    with pytest.raises(TypeError, match="has no hyperadapter"):
        plot(torch.nn.Linear(2, 2), folder)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=re.escape("One adapter must be active, but ['default', 'second'] are.")):
        plot(model, folder)
    assert not folder.exists()
    folder.write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"directory={str(folder)!r} is a file; pass a folder.")):
        plot(model, folder)
    assert folder.read_text() == "mine"


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = adapted_model("llama")
    with torch.no_grad():
        model.base_model.router.network("default").task_embedding.weight[1] = torch.nan
    with pytest.raises(ValueError, match=f"The update of task 'beta' at '{Q_PROJ}' is not finite"):
        plot(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hyperadapt.plots")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('Install it with pip install "hyperadapt[plot]".')):
        importlib.import_module("hyperadapt.plots")


def test_nothing_else_of_the_package_imports_matplotlib() -> None:
    # Inside of functions it is imported only when pictures are asked for.
    imports = {
        f"{path}: {ast.unparse(node)}"
        for path in (ROOT / "hyperadapt").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and path.parent.name != "plots"
    }
    assert not [line for line in imports if re.search(r"matplotlib|hyperadapt\.plots|hyperadapt import .*plots", line)]
