"""What a served adapter gives for a name: a task's LoRA, or a description's; or it says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperadapt import export_lora
from hyperadapt.loras.generator import LoraGenerator
from tests.support.helpers import TASKS, adapted_model, letters, run_python
from tests.support.hub_server import HubServer
from tests.support.served import BASE, cached, saved_adapter, served


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_task_is_what_is_exported(tmp_path: Path, adapter: Path) -> None:
    two = served(tmp_path, adapter)
    for task in TASKS:
        export_lora(adapted_model("llama"), task, tmp_path / task)
        assert_same(tensors(two.folder(task, BASE)), tensors(tmp_path / task))
    assert len(cached(tmp_path)) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("", "delta", "Beta", "beta/", "/beta", " beta", "beta ", "beta\n", "beta\x00"),
        *("../beta", "../../etc/passwd", "/etc/passwd", "..", ".", "beta/../gamma", "..\\beta"),
        *("~", "\ud800", "%2e%2e", "*", "a" * 100_000),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, adapter: Path, name: str) -> None:
    with pytest.raises(ValueError, match="The adapter 'two' has no task") as caught:
        served(tmp_path, adapter).folder(name, BASE)
    message = str(caught.value)
    assert message.endswith("nor is there such a description. Its tasks are ['alpha', 'beta', 'gamma'].")
    # One line of a sane length in the log, whatever was asked for.
    assert message.isprintable()
    assert len(message) < 300
    assert not (tmp_path / "cache").exists()


def test_tasks_with_odd_names_stay_in_the_cache(tmp_path: Path) -> None:
    tasks = ["../../evil", "/tmp/evil", "a/b", "nul", "\x00", "é" * 300]
    two = served(tmp_path, saved_adapter(tmp_path / "two", tasks=tasks))
    folders = [two.folder(task, BASE) for task in tasks]
    assert sorted(folders) == cached(tmp_path)
    assert len(set(folders)) == len(tasks)
    assert {path.name for path in tmp_path.iterdir()} == {"two", "cache"}


def test_an_adapter_on_the_hub(tmp_path: Path, adapter: Path, hub: HubServer) -> None:
    files = {path.name: path for path in adapter.iterdir()}
    hub.add_repo("user/two", files)
    hub.add_repo("user/many", {f"sub/folder/{name}": path for name, path in files.items()})
    addresses = ["user/two", "user/two@main", "user/many/sub/folder", "user/many@main/sub/folder"]
    # The same adapter makes the same LoRA.
    assert len({served(tmp_path, address).folder("beta", BASE) for address in [*addresses, adapter]}) == 1
    with pytest.raises(OSError, match="user/none"):
        served(tmp_path, "user/none").folder("beta", BASE)
    with pytest.raises(OSError, match="no-branch"):
        served(tmp_path, "user/two@no-branch").folder("beta", BASE)


AGAIN = """
import sys
from pathlib import Path
from tests.support.served import BASE, served

print(served(Path(sys.argv[1]), sys.argv[2]).folder("beta", BASE))
"""


def test_a_server_that_starts_later_finds_the_folder(tmp_path: Path) -> None:
    modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = saved_adapter(tmp_path / "two", target_modules=modules)
    folder = served(tmp_path, adapter).folder("beta", BASE)
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    # Where sets are in another order.
    assert run_python(AGAIN, tmp_path, adapter).stdout.strip() == str(folder)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_an_adapter_that_could_not_be_read_is_tried_again(tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "two")
    weights = tmp_path / "two" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    two = served(tmp_path, tmp_path / "two")
    with pytest.raises(ValueError, match="is damaged"):
        two.folder("beta", BASE)
    weights.write_bytes(content)
    assert two.folder("beta", BASE).is_dir()


def test_an_adapter_that_was_trained_anew_gets_new_folders(tmp_path: Path, adapter: Path) -> None:
    others = [saved_adapter(tmp_path / "seed", seed=1), saved_adapter(tmp_path / "alpha", lora_alpha=9)]
    folders = {served(tmp_path, address).folder("beta", BASE) for address in [adapter, *others]}
    assert len(folders) == 3
    # Also where modules that are trained in full differ, and nothing else.
    full = saved_adapter(tmp_path / "full", modules_to_save=["lm_head"])
    folders |= {served(tmp_path, full).folder("beta", BASE)}
    weights = full / "adapter_model.safetensors"
    changed = load_file(weights)
    [head] = [name for name in changed if "lm_head" in name]
    changed[head] = changed[head].bfloat16()
    save_file(changed, weights, metadata={"format": "pt"})
    folders |= {served(tmp_path, full).folder("beta", BASE)}
    assert len(folders) == 5


@pytest.mark.parametrize("by", ["name", "path", "snapshot", "setting", "nothing"])
def test_the_base_model(tmp_path: Path, adapter: Path, by: str) -> None:
    base, model, changes = tmp_path / "base", BASE, {}
    base.mkdir()
    if by == "path":
        adapter = saved_adapter(tmp_path / "two", f"{base}/")
        model = f"{base}/../base"
    elif by == "snapshot":
        # What vLLM calls it with HF_HUB_OFFLINE=1.
        snapshot = tmp_path / "hub" / "models--user--base" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        model = str(snapshot)
    elif by == "setting":
        model, changes = str(base), {"BASE_MODEL": BASE}
    elif by == "nothing":
        adapter = saved_adapter(tmp_path / "two", None)
    assert served(tmp_path, adapter, **changes).folder("beta", model).is_dir()


@pytest.mark.parametrize("model", ["user/other", "base", "user/base-2", "folder"])
def test_another_base_model_is_refused(tmp_path: Path, adapter: Path, model: str) -> None:
    if model == "folder":
        (tmp_path / "models--user--base-2").mkdir()
        model = str(tmp_path / "models--user--base-2")
    message = (
        f"^The adapter 'two' was made for 'user/base', but the server has '{model}'. If that is the same model under "
        "another name, set HYPERADAPT_LORA_RESOLVER_BASE_MODEL='user/base'.$"
    )
    with pytest.raises(ValueError, match=message):
        served(tmp_path, adapter).folder("beta", model)
    assert not (tmp_path / "cache").exists()


class Encoder:
    """Plays a sentence-transformers model."""

    def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
        return letters(texts)

    def __getitem__(self, index: int) -> "Encoder":
        return self


def test_descriptions_are_served_where_they_are_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperadapt.tasks.encoders._sentence_transformer", lambda name, revision: Encoder())
    tasks = {task: f"The task {task}." for task in TASKS}
    adapter = saved_adapter(tmp_path / "two", tasks=tasks, task_embedding="text", text_encoder="user/encoder")
    genre, mood = "Name the genre.", ["Name the mood.", "How does it feel?"]
    for name in ("genre", genre, "mood"):
        with pytest.raises(ValueError, match="nor is there such a description"):
            served(tmp_path, adapter).folder(name, BASE)
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps({"genre": genre, "mood": mood, "beta": "Something else."}))
    two, generator = served(tmp_path, adapter, DESCRIPTIONS=str(path)), LoraGenerator.from_pretrained(adapter)
    assert_same(tensors(two.folder("genre", BASE)), generator.from_description(genre).state_dict())
    assert_same(tensors(two.folder("mood", BASE)), generator.from_description(mood).state_dict())
    assert two.folder("genre", BASE) == two.folder(genre, BASE)
    # A task is what it was, whatever descriptions are called.
    assert_same(tensors(two.folder("beta", BASE)), generator.state_dict("beta"))
    with pytest.raises(ValueError, match="nor is there such a description"):
        two.folder("Name the genre", BASE)


def test_a_description_that_an_adapter_cannot_take_is_refused(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "descriptions.json").write_text('{"genre": "Name the genre."}')
    two = served(tmp_path, adapter, DESCRIPTIONS=str(tmp_path / "descriptions.json"))
    with pytest.raises(ValueError, match="task_embedding"):
        two.folder("genre", BASE)
    assert cached(tmp_path) == []
