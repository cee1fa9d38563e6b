"""Half-precision bases, adapters in float32 or the base's dtype, autocast, and casting afterwards."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import (
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
from tests.tolerances import HALF_PRECISION_MODEL

NORMALIZATIONS = ("soft_frobenius", "frobenius", "whitening", "sinkhorn")
HALVES = (torch.bfloat16, torch.float16)
BATCH = example_batch("llama", labels=False)


def half(dtype: torch.dtype, *, autocast_adapter_dtype: bool = True, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    config = adapter_config(**{"target_modules": "all-linear"} | changes)
    base = base_model("llama").to(dtype)
    return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()


def close(dtype: torch.dtype, expected: Tensor) -> dict[str, float]:
    return {"rtol": 0, "atol": HALF_PRECISION_MODEL * torch.finfo(dtype).eps * float(expected.abs().max())}


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["float32 adapter", "half adapter"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_bases(dtype: torch.dtype, normalization: str, autocast_adapter_dtype: bool) -> None:
    model = half(dtype, normalization=normalization, autocast_adapter_dtype=autocast_adapter_dtype)
    wanted = torch.float32 if autocast_adapter_dtype else dtype
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {wanted}
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
    model.merge_adapter()
    assert_close(logits(model, BATCH), alone, **close(dtype, alone))
    assert {weight.dtype for weight in model.get_base_model().lm_head.parameters()} == {dtype}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_adapter_trains_on_a_half_precision_base(dtype: torch.dtype, normalization: str) -> None:
    model = make_active(half(dtype, normalization=normalization)).train()
    loss = model(**example_batch("llama"), tasks=MIXED).loss
    loss.backward()
    exact = make_active(half(dtype, normalization=normalization)).float().train()
    exact(**example_batch("llama"), tasks=MIXED).loss.backward()
    expected = adapter_parameters(exact)
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        # Of the direction of the gradient without rounding.
        cosine = torch.cosine_similarity(parameter.grad.flatten(), expected[name].grad.flatten(), dim=0)
        assert cosine > 0.9, name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_around_a_float32_base(normalization: str) -> None:
    model = adapted_model("llama", normalization=normalization)
    expected = logits(model, BATCH, tasks=MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits(model, BATCH, tasks=MIXED)
        factors = model.base_model.router.factors_of_task("default", "beta")
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, **close(torch.bfloat16, expected))
    assert {tensor.dtype for one in factors.values() for tensor in one.tensors()} == {torch.float32}
    start = adapted_model("llama", active=False, normalization=normalization)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(start, BATCH, tasks=MIXED), logits(base_model("llama"), BATCH))
        start.train()
        start(**example_batch("llama"), tasks=MIXED).loss.backward()
    for name, parameter in adapter_parameters(start).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_the_whole_model_afterwards(cast: str) -> None:
    model = getattr(adapted_model("llama", active=False), cast)()
    base = getattr(base_model("llama"), cast)()
    [dtype] = {parameter.dtype for parameter in base.parameters()}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    start = logits(model, BATCH, tasks=MIXED)
    assert start.dtype == dtype
    assert torch.equal(start, logits(base, BATCH))
    make_active(model)
    expected = logits(adapted_model("llama"), BATCH, tasks=MIXED)
    actual = logits(model, BATCH, tasks=MIXED)
    least = dtype if dtype in HALVES else torch.float32
    # The random values that make an adapter active are drawn in its dtype, so only the size can be compared.
    assert 0.5 < float(actual.float().norm() / expected.norm()) < 2
    assert_close(logits(model, BATCH, tasks=MIXED), actual, **close(least, expected))
