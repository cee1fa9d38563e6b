"""A folder of many LoRAs, written one after the other, so that a process that was killed can be followed by another."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME

from hyperadapt.files import UNFINISHED, move_whole, write_whole
from hyperadapt.loras.file_formats import is_whole
from hyperadapt.loras.folders import write_lora
from hyperadapt.loras.lora import Lora

_WORK, _DONE = f"{UNFINISHED}loras", "done.jsonl"
_LOCK = f"{_WORK}.lock"


class UnfinishedLibrary:
    """Writes LoRAs to folders of their tasks' names, each complete or absent, and keeps a list of those."""

    def __init__(self, folder: Path, adapter: str, format: str) -> None:
        self.folder, self.format = folder, format
        self.work = folder / _WORK
        head = json.dumps({"adapter": adapter, "format": format})
        self.done = _tasks_done(self.work / _DONE, head)
        self.work.mkdir(exist_ok=True)
        write_whole(self.work / _DONE, "".join(f"{line}\n" for line in [head, *map(json.dumps, self.done)]))
        # What else is there was not finished.
        for rest in ("new", "old"):
            shutil.rmtree(self.work / rest, ignore_errors=True)
        self._list = (self.work / _DONE).open("a", encoding="utf-8", buffering=1)
        self._started, self._size = time.monotonic(), 0

    def has(self, task: str) -> bool:
        """Whether the task's LoRA was written, and is there."""
        return task in self.done and is_whole(self.folder / task, self.format)

    def add(self, lora: Lora) -> None:
        """Write the LoRA of a task."""
        assert lora.task is not None
        place, old, folder = self.work / "new", self.work / "old", self.folder / lora.task
        place.mkdir()
        write_lora(lora, place, folder, self.format)
        self._size += sum(path.stat().st_size for path in place.iterdir())
        move_whole([place], [folder], old, seal=CONFIG_NAME)
        for rest in (place, old):
            if rest.exists():
                shutil.rmtree(rest)
        self._list.write(f"{json.dumps(lora.task)}\n")
        self.done[lora.task] = None

    def close(self) -> None:
        """Close the list."""
        self._list.close()

    @property
    def progress(self) -> str:
        """Size and rate of what was written now."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._size / 1e6:,.1f} MB, {self._size / 1e6 / seconds:,.1f} MB/s"


@contextmanager
def unfinished_library(folder: Path, adapter: str, format: str) -> Iterator[UnfinishedLibrary]:
    """A library to add to, which goes on where one of the same adapter and format stopped; finished in the end.

    `adapter` is a text that is another one for another adapter. Where nothing was written, no trace is left.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            try:
                with closing(UnfinishedLibrary(folder, adapter, format)) as library:
                    yield library
            except BaseException:
                if len(_lines(folder / _WORK / _DONE)) < 3:
                    shutil.rmtree(folder / _WORK, ignore_errors=True)
                raise
            shutil.rmtree(library.work)
    except BaseException:
        # Only those that are empty can be removed.
        with suppress(OSError):
            for one in missing:
                one.rmdir()
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from writing a library to a folder, until this process does so no more, or dies."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"LoRAs are being written to {str(folder)!r} by another call of save_all or hyperadapt export. Wait for "
            "its end, or name another folder."
        ) from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink()
        lock.release()


def _tasks_done(path: Path, head: str) -> dict[str, None]:
    """The tasks that a list with this head names, in their order; none if there is no such list."""
    lines = _lines(path)
    done: dict[str, None] = {}
    if lines[0] == head:
        # A machine that lost its power may have left anything.
        with suppress(ValueError, TypeError):
            for line in lines[1:-1]:
                done[json.loads(line)] = None
    return done


def _lines(path: Path) -> list[str]:
    """The lines of a list; the last one is empty, or was not finished."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [""]
