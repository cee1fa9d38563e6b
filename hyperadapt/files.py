"""Files that are whole or not there, whenever the process dies."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; a failure leaves what was there."""
    path = Path(path)
    # Several processes may write one file.
    temporary = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def finite(value: Any) -> Any:
    """A value as JSON can hold it: None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(folder: str | os.PathLike[str], *, seal: str = "") -> Iterator[Path]:
    """As ``whole_folders``, for one folder."""
    with whole_folders([folder], seal=seal) as [new]:
        yield new


@contextmanager
def whole_folders(folders: Sequence[str | os.PathLike[str]], *, seal: str = "") -> Iterator[list[Path]]:
    """Empty folders to write to, whose files are moved into `folders` together in the end; on an error nothing changes.

    Missing folders are made, and other files in them are left alone. A process that is killed while the files are moved
    leaves some of them, but not `seal`: of the files that are moved it is taken away first and put there last.
    """
    targets = [Path(folder).absolute() for folder in folders]
    # On the targets' file system, and in them rather than beside them where they are there.
    place = Path(os.path.commonpath(targets))
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=UNFINISHED) as temporary:
        sources = [Path(temporary, str(index)) for index in range(len(targets))]
        for source in sources:
            source.mkdir()
        yield sources
        move_whole(sources, targets, Path(temporary, "old"), seal=seal)


def move_whole(sources: Sequence[Path], targets: Sequence[Path], old: Path, *, seal: str = "") -> None:
    """Move folders' files into others of the same file system together, as ``whole_folders`` does.

    What they replace goes to the folder `old`, which is made for that.
    """
    moves: list[tuple[Path, Path]] = []
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        moves += _moves(source, target)
    moves.sort(key=lambda move: move[1].name == seal)
    _replace(moves, old, seal)


def _moves(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """What is to be moved where: a folder that is there already stays, and gets the other's entries."""
    if source.is_dir() and target.is_dir():
        for name in sorted(os.listdir(source)):
            yield from _moves(source / name, target / name)
    else:
        yield source, target


def _replace(moves: Sequence[tuple[Path, Path]], old: Path, seal: str) -> None:
    """Make the moves, all or none; at any time a file but the seal is the old or the new one."""
    if any(os.path.lexists(target) for _, target in moves):
        old.mkdir()
    with ExitStack() as undo:
        for index, (_, target) in enumerate(moves):
            if target.name == seal and target.exists():
                os.rename(target, old / str(index))
                undo.callback(os.rename, old / str(index), target)
        for index, (source, target) in enumerate(moves):
            if os.path.lexists(target):
                _keep(target, old / str(index))
                os.replace(source, target)
                undo.callback(os.replace, old / str(index), target)
            else:
                os.rename(source, target)
                undo.callback(os.rename, target, source)
        undo.pop_all()


def _keep(path: Path, copy: Path) -> None:
    """Have a file in a second place, too."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        # A file system without links; a folder raises here, as it cannot be replaced by a file.
        shutil.copy2(path, copy, follow_symlinks=False)
