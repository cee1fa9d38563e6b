"""LoRA folders on the disk: made once, bounded in size, and there as long as a process may read them."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hyperadapt.files import UNFINISHED
from hyperadapt.loras.file_formats import is_whole

# What a killed process left unfinished may be taken away after so many seconds.
_ABANDONED = 3600


class LoraCache:
    """Folders by key, which several processes may share; the least recently used ones go first.

    Those that a running process was given stay until it ends: vLLM reads a LoRA's folder again whenever the LoRA has
    left its memory, and its engine dies if the folder is gone. A lock tells them, which ends with the process.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        # Open files with a shared lock, by key.
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def folder(self, key: str, save: Callable[[Path], None]) -> Path:
        """The folder of a key, which `save` writes, whole or not at all, if it is not there."""
        # Adapters with several names share keys.
        with self._making.setdefault(key, threading.Lock()):
            try:
                return self._folder(key, save)
            except OSError as error:
                if error.errno is None:
                    # Not one of the operating system, but of a download, say.
                    raise
                raise ValueError(
                    f"The cache {str(self._root)!r} cannot be written ({error}). Make room there, or set "
                    "HYPERADAPT_LORA_RESOLVER_CACHE_DIR to a folder of the server's own."
                ) from error

    def _folder(self, key: str, save: Callable[[Path], None]) -> Path:
        folder = self._root / key
        self._hold(key)
        is_new = not is_whole(folder)
        if is_new:
            try:
                save(folder)
            except OSError:
                # Another process may have been faster.
                if not is_whole(folder):
                    raise
        # When it was last used.
        os.utime(folder)
        if is_new:
            self._make_room(folder)
        return folder

    def _hold(self, key: str) -> None:
        with self._lock:
            if key not in self._held:
                self._root.mkdir(parents=True, exist_ok=True)
                file = self._open(key)
                # Waits while another process takes the folder away.
                fcntl.flock(file, fcntl.LOCK_SH)
                self._held[key] = file

    def _make_room(self, new: Path) -> None:
        """Take away folders until the bound is met; the new one, with an error, if all others are held."""
        with self._lock:
            folders = sorted(filter(self._is_own, self._root.iterdir()), key=_last_use)
            sizes = {folder: _size(folder) for folder in folders}
            excess = sum(sizes.values()) - self._max_bytes
            for folder in folders:
                if excess <= 0:
                    return
                if folder != new and self._remove(folder):
                    excess -= sizes[folder]
            if excess <= 0:
                return
            os.close(self._held.pop(new.name))
            self._remove(new)
        raise ValueError(
            f"The cache {str(self._root)!r} has no room for {sizes[new]:,} bytes: running servers may read all other "
            f"LoRAs in it again, and its bound is {self._max_bytes:,} bytes. Raise HYPERADAPT_LORA_RESOLVER_CACHE_GB."
        )

    def _is_own(self, folder: Path) -> bool:
        """Whether a cache has made it; whatever else may lie there is nobody's to take away."""
        is_own = folder.name.startswith(UNFINISHED) or self._lock_file(folder.name).exists()
        return is_own and folder.is_dir() and not folder.is_symlink()

    def _remove(self, folder: Path) -> bool:
        """Take a folder away that no process holds; whether that was done."""
        if folder.name.startswith(UNFINISHED):
            if time.time() - _last_use(folder) < _ABANDONED:
                return False
            shutil.rmtree(folder, ignore_errors=True)
            return True
        file = self._open(folder.name)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = self._root / f"{UNFINISHED}{uuid.uuid4().hex}"
            # Another process may have been faster.
            with suppress(FileNotFoundError):
                os.rename(folder, gone)
                shutil.rmtree(gone)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def _open(self, key: str) -> int:
        """The file whose lock says that a folder is held; never taken away, or there could be two of one key."""
        return os.open(self._lock_file(key), os.O_RDWR | os.O_CREAT, 0o600)

    def _lock_file(self, key: str) -> Path:
        return self._root / f"{key}.lock"


def _last_use(folder: Path) -> float:
    """In seconds; now, if the folder has vanished."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _size(folder: Path) -> int:
    """In bytes, of the files that are there; what is unfinished may vanish meanwhile."""
    size = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(path, file)).st_size
    return size
