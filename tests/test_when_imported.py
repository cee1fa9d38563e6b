"""An action follows an import, whoever makes it, once."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from hyperadapt.when_imported import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "watched_package.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "watched_package", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return "watched_package"


def test_it_waits_for_the_import(package: str) -> None:
    seen: list[int] = []
    finders = list(sys.meta_path)
    when_imported(package, lambda: seen.append(sys.modules[package].value))
    # Looking for it is no import.
    assert importlib.util.find_spec(package) is not None
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [1]
    assert sys.meta_path == finders
    assert inspect.getsource(module) == "value = 1\n"
    assert module.__loader__ is module.__spec__.loader
    when_imported(package, lambda: seen.append(2))
    assert seen == [1, 2]


def test_several_wait(package: str) -> None:
    seen: list[int] = []
    for index in range(2):
        when_imported(package, lambda index=index: seen.append(index))
    importlib.import_module(package)
    assert sorted(seen) == [0, 1]


def test_an_import_that_fails_may_be_tried_again(package: str, tmp_path: Path) -> None:
    seen: list[int] = []
    when_imported(package, lambda: seen.append(1))
    (tmp_path / "watched_package.py").write_text("raise RuntimeError\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError):
        importlib.import_module(package)
    assert seen == []
    (tmp_path / "watched_package.py").write_text("value = 3  # now\n")
    importlib.invalidate_caches()
    importlib.import_module(package)
    assert seen == [1]
