"""Half-precision bases, adapters in float32 or the base's dtype, autocast, and casting afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.tuner.layer_types import HyperAdapterLinear
from tests.support.helpers import (
    MIXED,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    example_batch,
    logits,
    make_active,
    row_of,
)
from tests.support.tolerances import FLOAT32_FORWARD, HALF_PRECISION_GRADIENT, HALF_PRECISION_MODEL, NORM_FLOAT32

NORMALIZATIONS = ("soft_frobenius", "soft_polar", "frobenius", "whitening", "sinkhorn")
HALVES = (torch.bfloat16, torch.float16)
BATCH = example_batch("llama", labels=False)


def half(dtype: torch.dtype, *, autocast_adapter_dtype: bool = True, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    config = adapter_config(**{"target_modules": "all-linear"} | changes)
    base = base_model("llama").to(dtype)
    return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()


def close(dtype: torch.dtype, expected: Tensor) -> dict[str, float]:
    return {"rtol": 0, "atol": HALF_PRECISION_MODEL * torch.finfo(dtype).eps * float(expected.abs().max())}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["float32 adapter", "half adapter"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_bases(dtype: torch.dtype, normalization: str, autocast_adapter_dtype: bool) -> None:
    model = half(dtype, normalization=normalization, autocast_adapter_dtype=autocast_adapter_dtype)
    wanted = torch.float32 if autocast_adapter_dtype else dtype
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {wanted}
    network = model.base_model.router.network("default")
    for position, norm in zip(network.positions, network.base_norms, strict=True):
        weight = model.get_base_model().get_submodule(position.name).weight.float()
        assert_close(norm, torch.linalg.matrix_norm(weight), rtol=NORM_FLOAT32, atol=0, msg=position.name)
    start = logits(model, BATCH, tasks=MIXED)
    assert start.dtype == dtype
    assert torch.equal(start, logits(base_model("llama").to(dtype), BATCH))

    make_active(model)
    mixed = logits(model, BATCH, tasks=MIXED)
    assert mixed.dtype == dtype
    assert mixed.isfinite().all()
    assert (mixed - start).abs().max() > 0.5
    for row, task in enumerate(MIXED):
        assert_close(logits(model, row_of(BATCH, row), tasks=task)[0], mixed[row], **close(dtype, mixed))
    model.set_task("beta")
    alone = logits(model, BATCH)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HyperAdapterLinear)}
    before = {name: layer.weight.detach().float() for name, layer in layers.items()}
    updates = {name: layer.get_delta_weight("default").float() for name, layer in layers.items()}
    model.merge_adapter()
    assert_close(logits(model, BATCH), alone, **close(dtype, alone))
    for name, layer in layers.items():
        assert layer.weight.dtype == dtype
        # The update is rounded, then the sum.
        limit = torch.finfo(dtype).eps * (before[name].abs() + updates[name].abs())
        assert ((layer.weight.float() - before[name] - updates[name]).abs() <= limit).all(), name
    model.unmerge_adapter()
    for name, layer in layers.items():
        limit = 2 * torch.finfo(dtype).eps * (before[name].abs() + updates[name].abs())
        assert ((layer.weight.float() - before[name]).abs() <= limit).all(), name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_adapter_trains_on_a_half_precision_base(dtype: torch.dtype, normalization: str) -> None:
    model = make_active(half(dtype, normalization=normalization)).train()
    loss = model(**example_batch("llama"), tasks=MIXED).loss
    loss.backward()
    exact = make_active(half(dtype, normalization=normalization)).float().train()
    exact(**example_batch("llama"), tasks=MIXED).loss.backward()
    expected, limit = adapter_parameters(exact), HALF_PRECISION_GRADIENT * torch.finfo(dtype).eps
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert relative_error(parameter.grad, expected[name].grad) < limit, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_around_a_float32_base(normalization: str) -> None:
    model = adapted_model("llama", normalization=normalization)
    expected = logits(model, BATCH, tasks=MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits(model, BATCH, tasks=MIXED)
        rows = [logits(model, row_of(BATCH, row), tasks=task)[0] for row, task in enumerate(MIXED)]
        factors = model.base_model.router.factors_of_task("default", "beta")
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, **close(torch.bfloat16, expected))
    assert_close(torch.stack(rows), actual, **close(torch.bfloat16, expected))
    exact = model.base_model.router.factors_of_task("default", "beta")
    for name, one in factors.items():
        for tensor, other in zip(one, exact[name], strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, other), name


def test_merging_rounds_nothing_under_autocast() -> None:
    weights = []
    for is_enabled in (False, True):
        model = adapted_model("llama")
        model.set_task("beta")
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            weights.append(model.merge_and_unload().state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_kept_factors_are_those_of_the_autocast_in_force() -> None:
    model = adapted_model("llama").requires_grad_(False)
    model.set_task("beta")
    expected = logits(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        half_precision = logits(model, BATCH)
        assert torch.equal(logits(model, BATCH), half_precision)
    assert torch.equal(logits(model, BATCH), expected)
    assert_close(half_precision.float(), expected, **close(torch.bfloat16, expected))


@pytest.mark.parametrize("tasks", [MIXED, ["gamma", "alpha", "beta"], "beta"], ids=["shared", "a task each", "one"])
@pytest.mark.parametrize("active", [False, True], ids=["start", "active"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_training_under_autocast(normalization: str, active: bool, tasks: list[str] | str) -> None:
    batch = example_batch("llama", rows=3 if len(tasks) == 3 else 4)
    model = adapted_model("llama", active=active, normalization=normalization)
    with torch.autocast("cpu", torch.bfloat16):
        if not active:
            assert torch.equal(logits(model, BATCH, tasks=MIXED), logits(base_model("llama"), BATCH))
        model.train()(**batch, tasks=tasks).loss.backward()
    exact = adapted_model("llama", active=active, normalization=normalization).train()
    exact(**batch, tasks=tasks).loss.backward()
    expected, limit = adapter_parameters(exact), HALF_PRECISION_GRADIENT * torch.finfo(torch.bfloat16).eps
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert relative_error(parameter.grad, expected[name].grad) < limit, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_the_whole_model_afterwards(cast: str, normalization: str) -> None:
    start = getattr(adapted_model("llama", active=False, normalization=normalization), cast)()
    base = getattr(base_model("llama"), cast)()
    [dtype] = {parameter.dtype for parameter in base.parameters()}
    assert {parameter.dtype for parameter in start.parameters()} == {dtype}
    output = logits(start, BATCH, tasks=MIXED)
    assert output.dtype == dtype
    assert torch.equal(output, logits(base, BATCH))
    model = adapted_model("llama", normalization=normalization)
    expected = logits(model, BATCH, tasks=MIXED)
    actual = logits(getattr(model, cast)(), BATCH, tasks=MIXED)
    assert actual.dtype == dtype
    limits = close(dtype, expected) if dtype in HALVES else {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}
    assert_close(actual.float(), expected, **limits)
    model.train()(**example_batch("llama"), tasks=MIXED).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loading_a_float32_adapter_onto_a_half_precision_base(
    dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = make_active(half(dtype, normalization="frobenius"))
    model.save_pretrained(tmp_path)
    base = base_model("llama").to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    state = model.base_model.router.network("default").state_dict()
    for name, value in loaded.base_model.router.network("default").state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, state[name]), name
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))
