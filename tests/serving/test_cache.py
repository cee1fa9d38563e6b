"""The cache of LoRA folders: made once, whole or absent, bounded, and never taken from a running process."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hyperadapt.files import whole_folder
from hyperadapt.serving.cache import LoraCache

SIZE = 100
# Holds a folder as another server does, until its input ends.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


def writer(text: str = "x", size: int = SIZE) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        with whole_folder(folder) as new:
            (new / "adapter_model.safetensors").write_text(text * size)
            (new / "adapter_config.json").touch()

    return save


def fails(folder: Path) -> None:
    raise AssertionError(f"{folder} is made again")


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def end(cache: LoraCache) -> None:
    """What the end of its process does."""
    for file in cache._held.values():
        os.close(file)
    cache._held.clear()


def run_threads(targets: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def filled(root: Path, keys: str, max_bytes: int) -> LoraCache:
    cache = LoraCache(root, max_bytes)
    for age, key in enumerate(keys):
        folder = cache.folder(key, writer(key))
        os.utime(folder, (age + 1, age + 1))
    return cache


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    cache = LoraCache(tmp_path / "new" / "cache", SIZE)
    folder = cache.folder("a", writer("a"))
    assert folder == tmp_path / "new" / "cache" / "a"
    assert (folder / "adapter_model.safetensors").read_text() == "a" * SIZE
    assert cache.folder("a", fails) == folder
    # A server that starts later finds it.
    assert LoraCache(folder.parent, SIZE).folder("a", fails) == folder


def test_threads_that_ask_at_once_make_a_folder_once(tmp_path: Path) -> None:
    cache, saves, found = LoraCache(tmp_path, SIZE), [], []

    def save(folder: Path) -> None:
        saves.append(folder)
        time.sleep(0.05)
        writer()(folder)

    run_threads([lambda: found.append(cache.folder("a", save))] * 4)
    assert saves == [tmp_path / "a"]
    assert found == [tmp_path / "a"] * 4


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    cache = LoraCache(tmp_path, SIZE)
    with pytest.raises(AssertionError, match="made again"):
        cache.folder("a", fails)
    assert folders(tmp_path) == []
    assert cache.folder("a", writer()).is_dir()


@pytest.mark.parametrize("what", ["all", "weights"])
def test_a_folder_that_somebody_deleted_is_made_again(tmp_path: Path, what: str) -> None:
    cache = LoraCache(tmp_path, SIZE)
    folder = cache.folder("a", writer())
    (folder / "adapter_model.safetensors").unlink()
    if what == "all":
        (folder / "adapter_config.json").unlink()
        folder.rmdir()
    assert (cache.folder("a", writer("b")) / "adapter_model.safetensors").read_text() == "b" * SIZE


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    end(filled(tmp_path, "abc", 3 * SIZE))
    cache = LoraCache(tmp_path, 3 * SIZE)
    # The oldest one is used again.
    cache.folder("a", fails)
    end(cache)
    cache.folder("d", writer())
    assert folders(tmp_path) == ["a", "c", "d"]
    cache.folder("e", writer(size=2 * SIZE))
    assert folders(tmp_path) == ["d", "e"]


def test_a_running_process_keeps_what_it_was_given(tmp_path: Path) -> None:
    cache = filled(tmp_path, "ab", 2 * SIZE)
    for _ in range(2):
        message = r"no room for 100 bytes: .* its bound is 200 bytes\. Raise HYPERADAPT_LORA_RESOLVER_CACHE_GB"
        with pytest.raises(ValueError, match=message):
            cache.folder("c", writer())
        assert folders(tmp_path) == ["a", "b"]
    end(cache)
    assert cache.folder("c", writer()).is_dir()
    assert folders(tmp_path) == ["b", "c"]


def test_another_process_keeps_what_it_was_given_until_it_is_killed(tmp_path: Path) -> None:
    end(filled(tmp_path, "ab", 2 * SIZE))
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        cache = LoraCache(tmp_path, 2 * SIZE)
        cache.folder("c", writer())
        assert folders(tmp_path) == ["a", "c"]
        holder.kill()
    cache.folder("d", writer())
    assert folders(tmp_path) == ["c", "d"]


def test_what_killed_processes_left_unfinished_goes(tmp_path: Path) -> None:
    end(filled(tmp_path, "a", SIZE))
    for name, age in ((".unfinished-old", 7200), (".unfinished-new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x" * SIZE)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    # What is new may still be written, and counts.
    with pytest.raises(ValueError, match="no room"):
        LoraCache(tmp_path, SIZE).folder("b", writer())
    assert folders(tmp_path) == [".unfinished-new"]


def test_what_others_keep_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("x" * 10 * SIZE)
    os.utime(tmp_path / "models", (1, 1))
    end(filled(tmp_path, "a", SIZE))
    LoraCache(tmp_path, SIZE).folder("b", writer())
    assert folders(tmp_path) == ["b", "models"]
    assert (tmp_path / "models" / "mine").exists()


def test_two_servers_that_make_a_folder_at_once_both_get_it(tmp_path: Path) -> None:
    first, second = LoraCache(tmp_path, SIZE), LoraCache(tmp_path, SIZE)

    def late(folder: Path) -> None:
        # After the other has looked, and before this one moves its own.
        first.folder("a", writer("a"))
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    folder = second.folder("a", late)
    assert (folder / "adapter_model.safetensors").read_text() == "a" * SIZE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def save(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    message = f"^The cache {str(tmp_path)!r} cannot be written .*{os.strerror(number)}.*_CACHE_DIR to a folder"
    with pytest.raises(ValueError, match=message):
        LoraCache(tmp_path, SIZE).folder("a", save)
    with pytest.raises(OSError, match="no such host"):
        LoraCache(tmp_path, SIZE).folder("a", lambda _: (_ for _ in ()).throw(OSError("no such host")))
    monkeypatch.setattr(os, "open", lambda *_: save(tmp_path))
    with pytest.raises(ValueError, match=message):
        LoraCache(tmp_path, SIZE).folder("a", fails)


def test_many_threads_keep_the_bound(tmp_path: Path) -> None:
    cache, refused = LoraCache(tmp_path, 5 * SIZE), []

    def make(key: str) -> None:
        try:
            cache.folder(key, writer())
        except ValueError:
            refused.append(key)

    run_threads([partial(make, key) for key in "abcdefgh"])
    assert len(refused) >= 3
    assert folders(tmp_path) == sorted(set("abcdefgh") - set(refused))
