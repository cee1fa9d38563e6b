"""What has to be installed is said, and an older release is left as it is."""

import importlib
import sys

import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

import sentence_transformers
from sentence_transformers.base.modules import Module

import hyperadapt

OURS = "hyperadapt.sentence_transformers"


@pytest.fixture(autouse=True)
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(OURS)
    monkeypatch.delitem(sys.modules, OURS)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules", None)
    with pytest.raises(
        ImportError, match=r"needs sentence-transformers 6.2 or newer, which could not be imported.*\[text"
    ):
        importlib.import_module(OURS)


def test_an_older_release_is_named_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Module, "on_model_ready")
    monkeypatch.setattr(sentence_transformers, "__version__", "5.2.0")
    with pytest.raises(ImportError, match=r"6.2 or newer, but 5.2.0 is installed. Upgrade it: pip install -U"):
        importlib.import_module(OURS)
    # Who imports sentence-transformers for something else is not disturbed.
    hyperadapt._let_folders_be_loaded()
