"""Replicas of a model in threads, as ``nn.DataParallel`` makes and runs them; Trainer does so on several GPUs."""

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from hyperadapt import use_tasks
from tests.support.helpers import MIXED, TASKS, adapted_model, example_batch, gradients, logits
from tests.support.tolerances import FLOAT64_MODEL

# The package gives this name to a function.
replication = importlib.import_module("torch.nn.parallel.replicate")
BATCH = example_batch("llama", labels=False)
IDS = torch.tensor([TASKS.index(task) for task in MIXED])
HALVES = (slice(0, 2), slice(2, 4))


def copied(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """What broadcasting to devices gives, on a CPU: tensors through which gradients reach the originals."""
    return [[tensor.detach() if detach else tensor.view_as(tensor) for tensor in tensors] for _ in devices]


@pytest.fixture
def on_replicas(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Runs half of the batch on each of two replicas, each in a thread of its own."""
    monkeypatch.setattr(replication, "_replicatable_module", lambda *_: True)
    monkeypatch.setattr(replication, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copied)

    def run(model: nn.Module, tasks: Tensor | None = None) -> Tensor:
        replicas = replication.replicate(model, [0, 1], detach=not torch.is_grad_enabled())

        def half(index: int) -> Tensor:
            rows = {key: value[HALVES[index]] for key, value in BATCH.items()}
            given: dict[str, Any] = {} if tasks is None else {"tasks": tasks[HALVES[index]]}
            output: Tensor = replicas[index](**rows, **given).logits
            return output

        with ThreadPoolExecutor(2) as threads:
            return torch.cat(list(threads.map(half, range(2))))

    return run


def test_outputs_and_gradients_are_those_of_the_model(on_replicas: Callable[..., Tensor]) -> None:
    model = adapted_model("llama").double().train()
    whole = model(**BATCH, tasks=IDS).logits
    whole.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    halves = on_replicas(model, IDS)
    halves.square().mean().backward()
    assert_close(halves, whole, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
    actual = gradients(model)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL, msg=name)


def test_one_task_for_all_replicas(on_replicas: Callable[..., Tensor]) -> None:
    model: PeftModel = adapted_model("llama").double()
    expected = logits(model, BATCH, tasks="beta")
    with torch.no_grad():
        # The replicas' threads are not inside of it.
        with use_tasks(model, "beta"), pytest.raises(ValueError, match="another thread is inside of use_tasks"):
            on_replicas(model)
        model.set_task("beta")
        assert_close(on_replicas(model), expected, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
