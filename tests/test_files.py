"""Files are replaced together or not at all, whenever a call fails or the process dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperadapt.files import UNFINISHED, whole_folder, whole_folders, write_whole

SEAL = "record.json"
# The seal is taken away, two files are replaced, one is new, and the seal is put there.
RENAMES = 5


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder; without what a killed process leaves to be removed."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if not name.startswith(UNFINISHED)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "mine", SEAL, "inner/c", "inner/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path


def write(new: Path) -> None:
    for name in (SEAL, "b", "inner/c", "inner/d"):
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text(f"new {name}")


AFTER = {
    **{name: f"new {name}" for name in (SEAL, "b", "inner/c", "inner/d")},
    **{name: f"old {name}" for name in ("mine", "inner/mine")},
}


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], list[Path]]:
    """Has ``os.rename`` and ``os.replace`` fail at some calls, and lists where they are asked to move files."""
    calls: list[Path] = []

    def fail_at(failing: range) -> list[Path]:
        def watched(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
            def moved(source: Path, target: Path) -> None:
                calls.append(target)
                if len(calls) - 1 in failing:
                    raise OSError("disk full")
                move(source, target)

            return moved

        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, watched(getattr(os, name)))
        return calls

    return fail_at


def test_files_are_replaced_and_others_are_kept(folder: Path) -> None:
    with whole_folder(folder, seal=SEAL) as new:
        write(new)
        assert contents(folder)["b"] == "old b"
    assert contents(folder) == AFTER
    assert sorted(os.listdir(folder)) == ["b", "inner", "mine", SEAL]


def test_a_failure_while_writing_changes_nothing(folder: Path) -> None:
    def write_and_fail() -> None:
        with whole_folders([folder, folder / "new" / "deep"]) as [new, _]:
            write(new)
            raise OSError("disk full")

    before = contents(folder)
    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert contents(folder) == before
    assert sorted(os.listdir(folder)) == ["b", "inner", "mine", SEAL]


@pytest.mark.parametrize("failing", range(RENAMES))
def test_a_failure_while_replacing_changes_nothing(
    folder: Path, failing: int, renames: Callable[[range], list[Path]]
) -> None:
    before = contents(folder)
    renames(range(failing, failing + 1))
    with pytest.raises(OSError, match="disk full"), whole_folder(folder, seal=SEAL) as new:
        write(new)
    assert contents(folder) == before


@pytest.mark.parametrize("failing", range(RENAMES))
def test_a_process_that_dies_while_replacing_leaves_no_seal(
    folder: Path, failing: int, renames: Callable[[range], list[Path]]
) -> None:
    before = contents(folder)
    # Nor can it undo anything.
    renames(range(failing, 99))
    with pytest.raises(OSError, match="disk full"), whole_folder(folder, seal=SEAL) as new:
        write(new)
    found = contents(folder)
    assert found == before if failing == 0 else SEAL not in found
    # No file is missing: each is the old one or the new one.
    assert {name: text.removeprefix("old ").removeprefix("new ") for name, text in found.items()} == {
        name: name for name in found
    }
    assert before.keys() - {SEAL} <= found.keys()


@pytest.mark.parametrize(("mine", "written"), [("b/mine", "b"), ("b", "b/written")])
def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path: Path, mine: str, written: str) -> None:
    for folder, name in ((tmp_path, mine), (tmp_path, "c")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")

    def replace() -> None:
        with whole_folder(tmp_path) as new:
            for name in ("c", written):
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text("new")

    with pytest.raises(OSError, match="irectory"):
        replace()
    assert contents(tmp_path) == {mine: "old", "c": "old"}


def test_a_new_folder_appears_at_once(tmp_path: Path, renames: Callable[[range], list[Path]]) -> None:
    calls = renames(range(0))
    with whole_folders([tmp_path / "all" / "a", tmp_path / "all" / "b"]) as folders:
        for new in folders:
            write(new)
        assert not (tmp_path / "all").exists()
    assert calls == [tmp_path / "all" / "a", tmp_path / "all" / "b"]
    assert os.listdir(tmp_path) == ["all"]
    assert sorted(os.listdir(tmp_path / "all")) == ["a", "b"]
    # As any other folder, not as a temporary one.
    (tmp_path / "other").mkdir()
    assert (tmp_path / "all" / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_behind_a_link_is_written_through_it(folder: Path) -> None:
    link = folder.parent / f"{folder.name}-link"
    link.symlink_to(folder)
    with whole_folder(link) as new:
        write(new)
    assert link.is_symlink()
    assert contents(folder) == AFTER


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "ä\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode()
    assert os.listdir(tmp_path) == ["a"]
