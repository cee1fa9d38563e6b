"""Every normalisation compiles into one graph, values and gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperadapt import normalize
from hyperadapt.normalization.formulas import METHODS
from tests.support.dense_updates import EACH

# Dynamo instantiates autograd functions while it traces them, which torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")


@pytest.mark.parametrize(("method", "options"), EACH, ids=str)
def test_compiled_equals_eager(method: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lora_A = torch.randn(3, 4, 20, requires_grad=True)
    lora_B = torch.randn(3, 16, 4, requires_grad=True)
    if "logits" in METHODS[method].needs:
        options = options | {"logits": torch.randn(3, 4, 4)}

    def loss(lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return (lora_B @ normalize(lora_A, lora_B, method, **options) @ lora_A).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(lora_A, lora_B)
    eager = loss(lora_A, lora_B)
    assert torch.equal(compiled, eager)
    inputs = (lora_A, lora_B)
    for actual, expected in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        assert torch.equal(actual, expected)
