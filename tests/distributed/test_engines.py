"""Two processes that see different tasks train the same weights as one process, whatever engine couples them."""

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from hyperadapt import export_lora
from hyperadapt.trainer.monitor import PositionMonitor
from tests.distributed.worker import (
    CHECKPOINTING,
    ENGINES,
    METHODS,
    PROCESSES,
    STEPS,
    counted_steps,
    main,
    make_model,
    optimizer_of,
    torch_step,
    train,
    watched,
)
from tests.support.helpers import adapter_parameters, base_model
from tests.support.tolerances import TWO_PROCESSES

CASES = [
    *((method, "none") for method in METHODS),
    *(("soft_frobenius", mode) for mode in CHECKPOINTING if mode != "none"),
]
TIMEOUT = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(engine: str, folder: Path) -> list[list[dict[str, Any]]]:
    context = mp.spawn(main, args=(engine, CASES, free_port(), folder), nprocs=PROCESSES, join=False)
    for process in context.processes:
        process.join(TIMEOUT)
    running = [process for process in context.processes if process.is_alive()]
    for process in running:
        process.kill()
    assert not running, f"still running after {TIMEOUT} s"
    assert [process.exitcode for process in context.processes] == [0] * PROCESSES
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed compiles. In the usual folder it would wait for ever for a lock that a killed process left."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="module")
def expected() -> list[tuple[dict[str, Tensor], Any, int | None]]:
    """The weights that one process reaches with all rows, and what the monitor sees on the way."""
    results = []
    for case in CASES:
        model = make_model(*case)
        monitor = PositionMonitor(model.base_model.router.network("default"))
        train(model, slice(None), torch_step(optimizer_of(model)))
        weights = {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
        results.append((weights, watched(monitor), counted_steps(model)))
    return results


@pytest.mark.multi_process
# What stage 2 shares out stage 3 does, too, and the parameters.
@pytest.mark.parametrize(
    "engine", [pytest.param(one, marks=pytest.mark.slow if one == "zero2" else ()) for one in ENGINES]
)
def test_two_processes_equal_one(
    engine: str,
    expected: list[tuple[dict[str, Tensor], Any, int | None]],
    extensions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its communication on CPUs")
    if engine.startswith("fsdp2") and Version(torch.__version__) < Version("2.13"):
        # Seen with torch 2.8, and there with a single linear layer, too.
        pytest.skip("FSDP2 of an older torch adds up gradients on CPUs, where it should average them")
    assert {counted for *_, counted in expected} == {STEPS, None}
    ranks = launch(engine, tmp_path)
    for case, (single, seen, counted), *results in zip(CASES, expected, *ranks, strict=True):
        for result in results:
            assert result["world"] == PROCESSES
            assert result["kind"] == engine.removesuffix("_network_apart")
            assert result["counted"] == counted
            assert result["weights"].keys() == single.keys()
            for name, value in single.items():
                assert torch.equal(result["weights"][name], results[0]["weights"][name]), (case, name)
                assert_close(result["weights"][name], value, rtol=TWO_PROCESSES, atol=TWO_PROCESSES)
        check_watched(seen, [result["watched"] for result in results])
        if engine.startswith("fsdp2") or engine == "zero3":
            for name, value in single.items():
                assert sum(result["sizes"][name] for result in results) == (0 if engine == "zero3" else value.numel())
    start = adapter_parameters(make_model(*CASES[0]))
    assert any((expected[0][0][name] - value).abs().max() > 1000 * TWO_PROCESSES for name, value in start.items())
    check_files(ranks[0][-1]["weights"], tmp_path)


def check_watched(single: Any, ranks: list[Any]) -> None:
    """What the monitors of both processes saw, whose rows have two tasks and one, against that of one process."""
    for name, value in single[0].items():
        largest = max(updates[name] for updates, _ in ranks)
        assert largest == pytest.approx(value, rel=TWO_PROCESSES, abs=TWO_PROCESSES)
    for layer, share in single[1].items():
        first, second = (layers[layer] for _, layers in ranks)
        assert (2 * first + second) / 3 == pytest.approx(share)


def check_files(weights: dict[str, Tensor], folder: Path) -> None:
    """What was saved from the last case's sharded model, against a model that was never sharded."""
    model = make_model(*CASES[-1]).eval()
    for name, parameter in adapter_parameters(model).items():
        parameter.data = weights[name]
    for path in (folder / name for name in ("adapter", "given") if (folder / name).exists()):
        saved = PeftModel.from_pretrained(base_model("llama"), path)
        for name, value in adapter_parameters(saved).items():
            assert torch.equal(value, weights[name]), name
    export_lora(model, "beta", folder / "lora")
    exported = load_file(folder / "lora" / "adapter_model.safetensors")
    for rank in range(PROCESSES):
        actual = load_file(folder / f"lora-{rank}" / "adapter_model.safetensors")
        assert actual.keys() == exported.keys()
        for name, value in exported.items():
            assert torch.equal(actual[name], value), name
