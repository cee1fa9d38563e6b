"""The resolver between vLLM, which a stand-in plays, and adapters."""

import asyncio
import importlib
import logging
import os
import sys
import threading
import time
import tomllib
from collections.abc import Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hyperadapt.loras.generator import LoraGenerator
from tests.support import vllm_standin
from tests.support.helpers import ROOT, TASKS
from tests.support.served import BASE, PREFIX, cached, saved_adapter
from tests.support.vllm_standin import Server


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with vLLM's in place; nothing is set but the cache's folder."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(f"{PREFIX}CACHE_DIR", str(tmp_path / "cache"))
    vllm_standin.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "hyperadapt.serving.resolver", raising=False)
    module = importlib.import_module("hyperadapt.serving.resolver")
    monkeypatch.delitem(sys.modules, "hyperadapt.serving.resolver")
    return module


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def two(resolver: ModuleType, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Any:
    """The resolver that is registered for an adapter named "two"."""
    monkeypatch.setenv(f"{PREFIX}ADAPTERS", f"two={adapter}")
    resolver.register()
    registry = resolver.LoRAResolverRegistry
    assert registry.get_supported_resolvers() == {"hyperadapt"}
    return registry.get_resolver("hyperadapt")


def run(*requests: Coroutine[Any, Any, Any]) -> list[Any]:
    async def gathered() -> list[Any]:
        return await asyncio.gather(*requests)

    return asyncio.run(gathered())


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {"vllm.general_plugins": {"hyperadapt": "hyperadapt.serving.resolver:register"}}


def test_nothing_is_registered_unless_adapters_are_named(resolver: ModuleType) -> None:
    resolver.register()
    assert not resolver.LoRAResolverRegistry.get_supported_resolvers()


def test_it_is_told_if_vllm_will_never_ask(
    resolver: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(f"{PREFIX}ADAPTERS", "user/two")
    resolver.register()
    assert caplog.records == []
    monkeypatch.setattr(resolver.envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", False)
    resolver.register()
    message = f"{PREFIX}ADAPTERS has no effect: vLLM resolves LoRAs only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
    assert [record.getMessage() for record in caplog.records] == [message]


def test_a_wrong_setting_ends_the_start(resolver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}ADAPTERS", "/data/two")
    with pytest.raises(ValueError, match="ADAPTERS holds '/data/two'"):
        resolver.register()


def test_a_server_gets_and_keeps_tasks(two: Any, tmp_path: Path) -> None:
    server = Server(BASE)
    requests = run(*(server.resolve_lora(f"two/{task}") for task in TASKS * 2))
    assert [request.lora_name for request in requests] == [f"two/{task}" for task in TASKS * 2]
    assert sorted({Path(request.lora_path) for request in requests}) == cached(tmp_path)
    assert all(server.load(request) for request in requests)


def test_vllm_gets_an_id_that_it_takes_and_that_stays(two: Any) -> None:
    ids = [request.lora_int_id for request in run(*(two.resolve_lora(BASE, f"two/{task}") for task in TASKS * 2))]
    assert ids[:3] == ids[3:]
    assert len(set(ids)) == 3
    assert all(0 < number < 2**31 for number in ids)


def test_requests_that_come_at_once_make_a_task_once(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, saves = [], []
    load, save = LoraGenerator.from_pretrained, LoraGenerator.save

    def loading(*args: Any, **kwargs: Any) -> LoraGenerator:
        loads.append(args)
        return load(*args, **kwargs)

    def saving(self: LoraGenerator, task: str, folder: Path) -> None:
        saves.append(task)
        time.sleep(0.05)
        save(self, task, folder)

    monkeypatch.setattr(LoraGenerator, "from_pretrained", loading)
    monkeypatch.setattr(LoraGenerator, "save", saving)
    # Without the server's own lock.
    requests = run(*(two.resolve_lora(BASE, f"two/{task}") for task in TASKS * 8))
    assert (len(loads), sorted(saves)) == (1, sorted(TASKS))
    assert len({request.lora_path for request in requests}) == 3


def test_a_request_that_is_given_up_leaves_the_task_for_the_next(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, started, save = [], threading.Event(), LoraGenerator.save

    def saving(self: LoraGenerator, task: str, folder: Path) -> None:
        saves.append(task)
        started.set()
        time.sleep(0.1)
        save(self, task, folder)

    monkeypatch.setattr(LoraGenerator, "save", saving)

    async def requests() -> Any:
        first = asyncio.create_task(two.resolve_lora(BASE, "two/beta"))
        await asyncio.to_thread(started.wait)
        first.cancel()
        return await two.resolve_lora(BASE, "two/beta")

    assert Path(asyncio.run(requests()).lora_path).is_dir()
    assert saves == ["beta"]


def test_the_server_goes_on_while_a_lora_is_made(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, save = threading.Event(), LoraGenerator.save

    def saving(self: LoraGenerator, task: str, folder: Path) -> None:
        assert ready.wait(60)
        save(self, task, folder)

    monkeypatch.setattr(LoraGenerator, "save", saving)

    async def both() -> Any:
        request = asyncio.create_task(two.resolve_lora(BASE, "two/beta"))
        # Another request's work; the LoRA cannot be made before it is done.
        await asyncio.sleep(0.01)
        ready.set()
        return await request

    assert asyncio.run(both())


def test_a_second_request_is_a_look_up(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(two.resolve_lora(BASE, "two/beta"))
    monkeypatch.setattr(LoraGenerator, "save", lambda *_: pytest.fail("made again"))

    async def seconds() -> float:
        start = time.perf_counter()
        assert await two.resolve_lora(BASE, "two/beta")
        return time.perf_counter() - start

    async def fastest() -> float:
        return min([await seconds() for _ in range(20)])

    # Mostly a thread that wakes up; 0.06 ms where little else runs.
    assert asyncio.run(fastest()) < 0.01


@pytest.mark.parametrize("name", ["", "two", "two2/beta", "TWO/beta", "/two/beta", "other/beta"])
def test_names_of_others_are_left_to_other_resolvers(two: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert run(two.resolve_lora(BASE, name)) == [None]
    assert caplog.records == []


@pytest.mark.parametrize("name", ["two/delta", "two/../../etc/passwd", "two/beta\nERROR", "two/\ud800"])
def test_what_is_refused_is_one_line_of_the_log(
    two: Any, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(two.resolve_lora(BASE, name)) == [None]
    [record] = caplog.records
    assert (record.levelno, record.name, record.exc_info) == (logging.WARNING, "vllm.hyperadapt", None)
    task = name.removeprefix("two/")
    assert record.getMessage().startswith(f"No LoRA for {name!r}: The adapter 'two' has no task {task!r}")
    assert record.getMessage().isprintable()
    assert cached(tmp_path) == []


def test_what_fails_is_logged_with_its_cause_and_tried_again(
    two: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(LoraGenerator, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        assert run(two.resolve_lora(BASE, "two/beta")) == [None]
    [record] = caplog.records
    assert record.getMessage() == "No LoRA for 'two/beta', because of a failure:"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "No space left on device"
    assert run(two.resolve_lora(BASE, "two/beta")) != [None]


def test_the_longest_name_of_an_adapter_counts(
    resolver: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: Path
) -> None:
    other = saved_adapter(tmp_path / "other", tasks=["b/beta", "c/beta"])
    monkeypatch.setenv(f"{PREFIX}ADAPTERS", f"a={other},a/b={adapter}")
    resolver.register()
    server = Server(BASE)
    names = ["a/b/beta", "a/c/beta", "a/b/b/beta"]
    assert [request is not None for request in run(*map(server.resolve_lora, names))] == [True, True, False]


def test_a_full_cache_refuses_and_keeps_what_vllm_may_read_again(
    two: Any, resolver: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [first] = run(two.resolve_lora(BASE, "two/alpha"))
    size = sum(path.stat().st_size for path in Path(first.lora_path).iterdir())
    monkeypatch.setenv(f"{PREFIX}CACHE_GB", str(2.5 * size / 1e9))
    resolver.register()
    server = Server(BASE)
    alpha, beta, gamma = run(*(server.resolve_lora(f"two/{task}") for task in TASKS))
    assert gamma is None
    assert "No LoRA for 'two/gamma': The cache " in caplog.text
    assert server.load(alpha)
    assert server.load(beta)
    assert cached(tmp_path) == sorted(map(Path, (alpha.lora_path, beta.lora_path)))


def test_a_rank_above_that_of_the_server_is_refused_by_vllm(two: Any) -> None:
    server = Server(BASE, max_lora_rank=4)
    with pytest.raises(ValueError, match="LoRA rank 8 is greater than max_lora_rank 4"):
        run(server.resolve_lora("two/beta"))
