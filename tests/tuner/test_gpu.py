"""On a GPU: the same values and gradients as on the CPU, and what only exists there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization import NORMALIZATIONS
from tests.support.helpers import (
    MIXED,
    TASKS,
    adapted_model,
    adapter_parameters,
    base_model,
    example_batch,
    logits,
    row_of,
)
from tests.support.tolerances import FLOAT32_CONDITIONED, HALF_PRECISION_MODEL

pytestmark = pytest.mark.gpu
IDS = torch.tensor([TASKS.index(task) for task in MIXED])


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cuda() for name, values in batch.items()}


def loss_and_gradients(model: PeftModel, batch: dict[str, Tensor], tasks: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(**batch, tasks=tasks)
    outputs.loss.backward()
    return measured(model, outputs.logits)


def measured(model: PeftModel, logits: Tensor) -> dict[str, Tensor]:
    tensors = {name: parameter.grad for name, parameter in adapter_parameters(model).items()} | {"logits": logits}
    # Copies: moving a model moves its gradients, too.
    return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(values.norm() for name, values in expected.items() if name != "logits")
    for name, values in expected.items():
        # Gradients of what cancels are small beside the others, and as inexact as those.
        size = values.norm() if name == "logits" else largest
        assert (actual[name] - values).norm() <= FLOAT32_CONDITIONED * size, name


@pytest.mark.parametrize(
    ("architecture", "normalization"),
    [(name, "soft_frobenius") for name in ("bert", "gpt2", "t5", "vit")]
    + [("llama", normalization) for normalization in NORMALIZATIONS],
)
def test_values_and_gradients_are_those_of_the_cpu(
    architecture: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Vision models convolve, in TF32 where allowed.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batch = adapted_model(architecture, normalization=normalization), example_batch(architecture)
    expected = loss_and_gradients(model, batch, IDS)
    model.cuda()
    for tasks in (MIXED, IDS, IDS.cuda()):
        assert_near(loss_and_gradients(model, on_gpu(batch), tasks), expected)


def test_every_way_to_serve_a_task() -> None:
    model, batch = adapted_model("llama").cuda(), on_gpu(example_batch("llama", labels=False))
    mixed = logits(model, batch, tasks=IDS.cuda())
    near = {"rtol": FLOAT32_CONDITIONED, "atol": FLOAT32_CONDITIONED * float(mixed.abs().max())}
    for row, task in enumerate(MIXED):
        assert_close(logits(model, row_of(batch, row), tasks=task)[0], mixed[row], **near)
    with model.disable_adapter():
        assert_close(logits(model, batch), logits(base_model("llama").cuda(), batch), **near)
    model.set_task("beta")
    alone = logits(model, batch)
    assert (alone - mixed)[1].abs().max() > 0.1
    model.merge_adapter()
    assert_close(logits(model, batch), alone, **near)
    model.unmerge_adapter()
    assert_close(logits(model, batch), alone, **near)


def test_generation_writes_the_tokens_of_the_cpu() -> None:
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    options = {"max_new_tokens": 5, "do_sample": False, "tasks": MIXED}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.cuda().generate(**on_gpu(batch), **options).cpu(), expected)


def test_a_saved_adapter_loads_on_either_device(tmp_path: Path) -> None:
    model, batch = adapted_model("llama").cuda(), example_batch("llama", labels=False)
    expected = logits(model, on_gpu(batch), tasks=MIXED)
    near = {"rtol": FLOAT32_CONDITIONED, "atol": FLOAT32_CONDITIONED * float(expected.abs().max())}
    model.save_pretrained(tmp_path)
    for device in ("cpu", "cuda"):
        loaded = PeftModel.from_pretrained(base_model("llama").to(device), str(tmp_path)).eval()
        assert {parameter.device.type for parameter in loaded.parameters()} == {device}
        inputs = {name: values.to(device) for name, values in batch.items()}
        assert_close(logits(loaded, inputs, tasks=MIXED), expected.to(device), **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases_and_autocast(dtype: torch.dtype) -> None:
    model, batch = adapted_model("llama").cuda(), on_gpu(example_batch("llama", labels=False))
    expected = logits(model, batch, tasks=MIXED)
    near = {"rtol": 0, "atol": HALF_PRECISION_MODEL * torch.finfo(dtype).eps * float(expected.abs().max())}
    with torch.autocast("cuda", dtype=dtype):
        assert_close(logits(model, batch, tasks=MIXED).float(), expected, **near)
    half = adapted_model("llama").to(dtype).cuda()
    actual = logits(half, batch, tasks=MIXED)
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, **near)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training(mode: str) -> None:
    torch.compiler.reset()
    model, batch = adapted_model("llama").cuda(), on_gpu(example_batch("llama"))
    graph = torch.compile(model, mode=mode)
    # A graph of CUDA's calls is recorded in the second call and replayed from the third on.
    for shift in (0, 1, 2, 0, 1):
        tasks = ((IDS + shift) % len(TASKS)).cuda()
        expected = loss_and_gradients(model, batch, tasks)
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        outputs = graph(**batch, tasks=tasks)
        outputs.loss.backward()
        assert_near(measured(model, outputs.logits), expected)
