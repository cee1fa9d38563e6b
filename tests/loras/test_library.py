"""Many LoRAs, streamed: each folder is complete or absent, and a call goes on where another was killed."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers.utils import logging

from hyperadapt import LoraGenerator, export_loras
from hyperadapt.loras import folders, library, tensor_files
from tests.support.helpers import ROOT, TASKS, adapted_model

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
# Kills itself at the N-th event of the file system.
KILLED = """
import os
import signal
import sys

from hyperadapt import LoraGenerator

generator, left = LoraGenerator.from_pretrained(sys.argv[1]), int(sys.argv[3])

def count(event, args):
    global left
    if event.split(".")[0] in ("open", "os", "shutil"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

generator.save("task 0", sys.argv[2] + "-once")
sys.addaudithook(count)
generator.save_all(sys.argv[2])
"""


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def generator(tmp_path: Path) -> LoraGenerator:
    model = adapted_model("llama", tasks=[f"task {index}" for index in range(8)], target_modules=["q_proj"])
    model.save_pretrained(str(tmp_path / "adapter"))
    return LoraGenerator.from_pretrained(tmp_path / "adapter")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the cards, which name their folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_complete(folder: Path, tasks: list[str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(tasks)
    assert all({file.name for file in (folder / task).iterdir()} == FILES for task in tasks)


@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_all_tasks_are_those_of_the_live_model(tmp_path: Path, format: str) -> None:
    model = adapted_model("llama", tasks=TASKS)
    generator = LoraGenerator.from_model(model)
    assert generator.save_all(tmp_path / "new" / "all", format=format) == {
        task: tmp_path / "new" / "all" / task for task in TASKS
    }
    export_loras(model, tmp_path / "live", format=format)
    assert contents(tmp_path / "new" / "all") == contents(tmp_path / "live")
    assert {path.name for path in (tmp_path / "new" / "all").iterdir()} == set(TASKS)


def test_a_killed_process_is_followed_by_another(tmp_path: Path, generator: LoraGenerator) -> None:
    generator.save_all(tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "adapter"), str(tmp_path / "killed"), "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    folder = tmp_path / "killed"
    done = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert 0 < len(done) < 8
    before = {name: (folder / name).stat().st_ino for name in done}
    for name in done:
        assert {file.name for file in (folder / name).iterdir()} == FILES
    generator.save_all(folder)
    assert_complete(folder, generator.tasks)
    assert contents(folder) == contents(tmp_path / "whole")
    # The last one may not have been listed yet.
    kept = [name for name, inode in before.items() if (folder / name).stat().st_ino == inode]
    assert len(kept) >= len(done) - 1 > 0


class Stopped(BaseException):
    """As Ctrl-C, but nothing that a test runner waits for."""


def stop_at(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    def write(lora: Any, *arguments: Any) -> None:
        if lora.task == task:
            raise Stopped
        folders.write_lora(lora, *arguments)

    monkeypatch.setattr(library, "write_lora", write)


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are written from now on."""
    tasks: list[str] = []

    def write(lora: Any, *arguments: Any) -> None:
        tasks.append(lora.task)
        folders.write_lora(lora, *arguments)

    monkeypatch.setattr(library, "write_lora", write)
    return tasks


def test_what_was_done_is_not_done_again(
    tmp_path: Path, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "all"
    stop_at(monkeypatch, "task 3")
    with pytest.raises(Stopped):
        generator.save_all(folder)
    # A folder that somebody took away, and a line that was not finished.
    (folder / "task 1" / "README.md").unlink()
    for path in (folder / "task 1").iterdir():
        path.unlink()
    (folder / "task 1").rmdir()
    # As a cleaner of temporary files does.
    (folder / "task 2" / "adapter_model.safetensors").unlink()
    [listing] = (folder / ".unfinished-loras").glob("*.jsonl")
    listing.write_text(listing.read_text() + '"task 7')
    tasks = written(monkeypatch)
    generator.save_all(folder)
    assert tasks == ["task 1", "task 2", "task 3", "task 4", "task 5", "task 6", "task 7"]
    assert_complete(folder, generator.tasks)
    # What has ended begins anew.
    tasks.clear()
    generator.save_all(folder, ["task 5"])
    assert tasks == ["task 5"]


@pytest.mark.parametrize("change", ["weights", "configuration", "format"])
def test_another_adapter_begins_anew(
    tmp_path: Path, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    stop_at(monkeypatch, "task 3")
    with pytest.raises(Stopped):
        generator.save_all(tmp_path / "all")
    if change == "weights":
        with torch.no_grad():
            generator.network.task_embedding.weight.neg_()
    elif change == "configuration":
        generator.config.revision = "other"
    tasks = written(monkeypatch)
    generator.save_all(tmp_path / "all", format="mlx" if change == "format" else "peft")
    assert tasks == generator.tasks


@pytest.mark.parametrize("listing", ["", "{}", "[]\n", "\xff", "HEAD\n\0\0\n", "HEAD\n[1]\n", "HEAD\n5\n"])
def test_a_list_of_something_else(tmp_path: Path, generator: LoraGenerator, listing: str) -> None:
    path = tmp_path / "all" / ".unfinished-loras" / "done.jsonl"
    path.parent.mkdir(parents=True)
    head = json.dumps({"adapter": generator.fingerprint(), "format": "peft"})
    path.write_text(listing.replace("HEAD", head), encoding="latin-1")
    generator.save_all(tmp_path / "all")
    assert_complete(tmp_path / "all", generator.tasks)


def test_folders_that_are_there_keep_other_files(tmp_path: Path, generator: LoraGenerator) -> None:
    generator.save_all(tmp_path / "all")
    (tmp_path / "all" / "task 2" / "mine").write_text("mine")
    (tmp_path / "all" / "task 2" / "adapter_model.safetensors").write_text("damaged")
    before = contents(tmp_path / "all")
    generator.save_all(tmp_path / "all")
    after = contents(tmp_path / "all")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"task 2/adapter_model.safetensors"}


def test_an_error_at_the_first_leaves_no_trace(tmp_path: Path, generator: LoraGenerator) -> None:
    for options, message in (
        ({"format": "diffusers"}, "format='diffusers' is for models of diffusers"),
        ({"format": "zip"}, "format='zip' is unknown."),
        ({"tasks": ["task 1", "task 1"]}, "would share a folder"),
        ({"tasks": []}, "tasks is empty"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.save_all(tmp_path / "new" / "all", **options)
        assert not (tmp_path / "new").exists()


def test_one_call_at_a_time_writes_to_a_folder(
    tmp_path: Path, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, refused = threading.Event(), threading.Event()

    def write(lora: Any, *arguments: Any) -> None:
        begun.set()
        assert refused.wait(60)
        folders.write_lora(lora, *arguments)

    monkeypatch.setattr(library, "write_lora", write)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(generator.save_all, tmp_path / "all", ["task 1", "task 2"])
        assert begun.wait(60)
        message = (
            f"LoRAs are being written to {str(tmp_path / 'all')!r} by another call of save_all or hyperadapt export."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.save_all(tmp_path / "all", ["task 3"])
        refused.set()
        assert list(first.result()) == ["task 1", "task 2"]
    assert_complete(tmp_path / "all", ["task 1", "task 2"])
    generator.save_all(tmp_path / "all", ["task 3"])
    assert_complete(tmp_path / "all", ["task 1", "task 2", "task 3"])


def test_a_list_outlives_a_start_that_fails(
    tmp_path: Path, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "task 3")
    with pytest.raises(Stopped):
        generator.save_all(tmp_path / "all")
    with monkeypatch.context() as full:
        full.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="No space left"):
            generator.save_all(tmp_path / "all")
    tasks = written(monkeypatch)
    generator.save_all(tmp_path / "all")
    assert tasks == generator.tasks[3:]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["list", "tensors"])
def test_a_full_disk_leaves_no_trace(
    tmp_path: Path, generator: LoraGenerator, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    if at == "list":
        monkeypatch.setattr(os, "replace", no_space)
    else:
        # As safetensors says it.
        error = SafetensorError("I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(tensor_files, "save_file", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="No space left on device") as caught:
        generator.save_all(tmp_path / "new" / "all")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "new").exists()


def test_what_is_no_folder_is_refused(tmp_path: Path, generator: LoraGenerator) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "task 1").symlink_to(tmp_path / "nowhere")
    for folder, named in (("file", "file"), ("file/all", "file"), ("all", "all/task 1")):
        message = f"directory={str(tmp_path / named)!r} is a file; pass a folder."
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.save_all(tmp_path / folder)
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.save("task 1", tmp_path / folder / "task 1")
    assert (tmp_path / "file").read_text() == "mine"


def test_names_do_not_leave_the_folder(tmp_path: Path) -> None:
    generator = LoraGenerator.from_model(adapted_model("llama", tasks=["alpha", "../beta"], target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=re.escape("Task '../beta' cannot be the name of a folder")):
        generator.save_all(tmp_path / "all")
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_one_lora(tmp_path: Path) -> None:
    tasks = [f"task {index}" for index in range(300)]
    generator = LoraGenerator.from_model(adapted_model("llama", tasks=tasks, target_modules=["q_proj"]))
    generator.save_all(tmp_path / "some", tasks[:20])
    peaks = []
    for count in (100, 300):
        tracemalloc.start()
        generator.save_all(tmp_path / str(count), tasks[:count])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What is left of each is its name and the path of its folder.
    assert peaks[1] - peaks[0] < 200 * 1500


def test_rate_and_size_are_shown(tmp_path: Path, generator: LoraGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    generator.save_all(tmp_path / "all")
    shown = capsys.readouterr().err
    assert re.search(r"8/8 \[.*LoRA/s, \d+\.\d MB, \d+\.\d MB/s\]", shown), shown
    assert json.loads((tmp_path / "all" / "task 1" / "adapter_config.json").read_text())["peft_type"] == "LORA"
