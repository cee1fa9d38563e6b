"""Norms of base weights: layer types, weights that cannot be read, offloaded ones, and norms from a file."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.router import Router
from hyperadapt.tuner import model as model_module
from hyperadapt.tuner.base_norms import base_norm, is_made_empty
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.layer_types import HyperAdapterConvolution, HyperAdapterEmbedding, HyperAdapterLinear
from tests.support.helpers import (
    MIXED,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    example_batch,
    logits,
    make_active,
)
from tests.support.tolerances import FLOAT16_WITHOUT_BIAS, NORM_FLOAT32

BATCH = example_batch("llama", labels=False)
META = "The weight of module 'layer' is on the meta device"


class Opaque(nn.Module):
    """A linear layer whose weight only its own product can read; notes how many rows it is given."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", (weight.detach().T * 1024).round().int())
        self.register_buffer("scales", torch.tensor(1 / 1024, dtype=weight.dtype))
        self.bias = nn.Parameter(torch.full_like(weight[:, 0], bias))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return x @ (self.qweight * self.scales) + self.bias


class NotImplementedBackend(ForwardOnlyQuantizationBackend):
    """As PEFT's for torchao, with a weight that has no `dequantize`."""

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        raise NotImplementedError("Weights of this type do not support dequantization (yet).")


BACKENDS = (ForwardOnlyQuantizationBackend("gptq"), NotImplementedBackend("torchao"))


def wrapped(module: nn.Module, backend: QuantizationBackend | None = None) -> HyperAdapterLayer:
    layer_type: type[HyperAdapterLayer] = HyperAdapterLinear
    if isinstance(module, nn.Embedding):
        layer_type = HyperAdapterEmbedding
    elif isinstance(module, nn.Conv2d):
        layer_type = HyperAdapterConvolution
    return layer_type(module, Router(nn.ModuleDict()), backend)


def norm_of(layer: HyperAdapterLayer, in_features: int = 24) -> Tensor:
    return base_norm(layer, Position("layer", in_features, 16, 4, 1.0))


def network(model: PeftModel) -> HyperAdapterNetwork:
    found: HyperAdapterNetwork = model.base_model.router.network("default")
    return found


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(24, 16), lambda: Conv1D(16, 24), lambda: nn.Embedding(24, 16), lambda: nn.Conv2d(3, 16, 2)],
    ids=["Linear", "Conv1D", "Embedding", "Conv2d"],
)
def test_norm_of_the_weight(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    module = make().to(dtype)
    # The norm, and squares on the way to it, would overflow in float16.
    module.weight.data.div_(module.weight.abs().max()).mul_(2e4)
    norm = norm_of(wrapped(module))
    assert norm > torch.finfo(torch.float16).max
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert not norm.requires_grad
    expected = module.weight.double().square().sum().sqrt().float()
    assert_close(norm, expected, rtol=NORM_FLOAT32, atol=0)


@pytest.mark.parametrize("backend", BACKENDS, ids=["TypeError", "NotImplementedError"])
@pytest.mark.parametrize("width", [1, 511, 512, 513, 1100])
def test_norm_of_a_weight_that_cannot_be_read(width: int, backend: QuantizationBackend) -> None:
    module = Opaque(torch.randn(16, width), bias=1.0)
    norm = norm_of(wrapped(module, backend), width)
    assert max(module.rows) <= 512
    # All columns, and the bias alone.
    assert sum(module.rows) == width + 1
    assert not norm.requires_grad
    expected = (module.qweight * module.scales).double().square().sum().sqrt().float()
    assert_close(norm, expected, rtol=NORM_FLOAT32, atol=0)


def test_norm_of_an_unreadable_weight_in_the_dtype_of_its_scales() -> None:
    module = Opaque(torch.randn(16, 600).half(), bias=0.5)
    norm = norm_of(wrapped(module, BACKENDS[0]), 600)
    assert norm.dtype == torch.float32
    expected = (module.qweight * module.scales).double().square().sum().sqrt().float()
    assert_close(norm, expected, rtol=FLOAT16_WITHOUT_BIAS, atol=0)


class ScaledFloat8(nn.Linear):
    """Its weight alone is not the layer's: it is multiplied by a scale."""

    def __init__(self) -> None:
        super().__init__(16, 8, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_float8_weights_with_scales_are_applied() -> None:
    base = ScaledFloat8()
    model = get_peft_model(nn.Sequential(base), adapter_config(target_modules=["0"]))
    network = model.base_model.router.network("default")
    assert_close(network.base_norms, (base.weight.float() * 0.25).norm()[None], rtol=NORM_FLOAT32, atol=0)
    assert network.task_embedding.weight.dtype == torch.float32
    assert model(torch.ones(2, 16), tasks="beta").shape == (2, 8)


def test_a_layer_that_can_be_neither_read_nor_applied() -> None:
    module = Opaque(torch.randn(16, 24))
    module.forward = lambda x: torch.zeros(0).reshape(7)  # type: ignore[method-assign]
    message = (
        "'layer', the unit of bounds and gains, cannot be found: the Opaque can neither be dequantised nor applied"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        norm_of(wrapped(module, BACKENDS[0]))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("opaque", [False, True], ids=["read", "applied"])
def test_norms_that_are_no_unit(value: float, opaque: bool) -> None:
    module: nn.Module = Opaque(torch.ones(16, 24)) if opaque else nn.Linear(24, 16)
    with torch.no_grad():
        (module.scales if opaque else module.weight).fill_(value)
    with pytest.raises(ValueError, match=r"'layer' has Frobenius norm (0\.0|nan|inf), which cannot be the unit"):
        norm_of(wrapped(module, BACKENDS[0] if opaque else None))


@pytest.mark.parametrize("opaque", [False, True], ids=["read", "applied"])
def test_the_meta_device_is_refused(opaque: bool) -> None:
    module: nn.Module = Opaque(torch.ones(16, 24)) if opaque else nn.Linear(24, 16)
    with pytest.raises(ValueError, match=META):
        norm_of(wrapped(module.to("meta"), BACKENDS[0] if opaque else None))


def offload(module: nn.Module, folder: Path | None, **options: Any) -> None:
    # As part of a model, whose own hook is another.
    model = module if len(list(module.children())) else nn.Sequential(module)
    if folder is None:
        cpu_offload(model, execution_device="cpu", **options)
    else:
        disk_offload(model, str(folder), execution_device="cpu", **options)


@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@pytest.mark.parametrize("opaque", [False, True], ids=["read", "applied"])
def test_offloaded_weights_are_read_and_stay_offloaded(opaque: bool, disk: bool, tmp_path: Path) -> None:
    module: nn.Module = Opaque(torch.randn(16, 600)) if opaque else nn.Linear(600, 16)
    layer = wrapped(module, BACKENDS[0] if opaque else None)
    expected = norm_of(layer, 600)
    offload(module, tmp_path if disk else None, offload_buffers=True)
    tensors = module._hf_hook.weights_map
    assert torch.equal(norm_of(layer, 600), expected)
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    # PEFT's onload_layer replaces these by copies in memory.
    assert module._hf_hook.weights_map is tensors


@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
def test_an_error_leaves_an_offloaded_weight_offloaded(disk: bool, tmp_path: Path) -> None:
    module = nn.Linear(24, 16)
    nn.init.zeros_(module.weight)
    layer = wrapped(module)
    offload(module, tmp_path if disk else None)
    with pytest.raises(ValueError, match=r"Frobenius norm 0\.0"):
        norm_of(layer)
    assert module.weight.is_meta


def test_the_norms_reach_the_network() -> None:
    found = network(adapted_model("llama"))
    base = base_model("llama")
    for position, norm in zip(found.positions, found.base_norms, strict=True):
        weight = base.get_submodule(position.name).weight
        assert_close(norm, torch.linalg.matrix_norm(weight), rtol=NORM_FLOAT32, atol=0)


def test_the_norms_of_a_further_adapter_are_those_without_a_merged_task() -> None:
    model = adapted_model("llama").double()
    expected = network(model).base_norms.clone()
    model.set_task("beta")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", adapter_config(target_modules="all-linear"))
    assert_close(model.base_model.router.network("second").base_norms, expected.float(), rtol=NORM_FLOAT32, atol=0)


def test_whether_parameters_are_made_empty_is_found_without_random_numbers() -> None:
    state = torch.get_rng_state()
    assert not is_made_empty()
    with init_empty_weights():
        assert is_made_empty()
    with torch.device("meta"):
        assert is_made_empty()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])
def test_no_norm_is_read_where_a_file_has_them(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model("llama", normalization="frobenius")
    # As saved from another base, say before it was quantised.
    network(model).base_norms.mul_(1.5)
    expected = logits(model, BATCH, tasks=MIXED)
    model.save_pretrained(tmp_path)
    loaded = adapted_model("llama", seed=3) if way == "load_adapter" else None
    monkeypatch.setattr(model_module, "base_norm", lambda *_: pytest.fail("A norm was read."))
    if way == "from_pretrained":
        loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=True)
    elif way == "load_adapter":
        loaded.load_adapter(tmp_path, "more", low_cpu_mem_usage=True)
        loaded.set_adapter("more")
        assert torch.equal(loaded.base_model.router.network("more").base_norms, network(model).base_norms)
        return
    else:
        loaded = get_peft_model(base_model("llama"), model.peft_config["default"], low_cpu_mem_usage=True)
        assert network(loaded).base_norms.isnan().all()
        set_peft_model_state_dict(loaded, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(network(loaded).base_norms, network(model).base_norms)
    assert torch.equal(logits(loaded.eval(), BATCH, tasks=MIXED), expected)


def test_loading_onto_a_base_on_the_meta_device(tmp_path: Path) -> None:
    model = adapted_model("llama")
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        base = LlamaForCausalLM(model.config)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(network(loaded).base_norms, network(model).base_norms)
    weights = {name: value for name, value in model.state_dict().items() if "hyperadapter_" not in name}
    assert loaded.load_state_dict(weights, strict=False, assign=True).unexpected_keys == []
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))


def test_loading_onto_a_base_on_the_meta_device_without_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = adapted_model("llama")
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        base = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"on the meta device.* with low_cpu_mem_usage=True"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
def test_adapting_an_offloaded_base(disk: bool, tmp_path: Path) -> None:
    expected = adapted_model("llama")
    base = base_model("llama")
    offload(base, tmp_path if disk else None)
    torch.manual_seed(1)
    model = get_peft_model(base, adapter_config(target_modules="all-linear"))
    assert not any(parameter.is_meta for parameter in adapter_parameters(model).values())
    assert torch.equal(network(model).base_norms, network(expected).base_norms)
    assert torch.equal(logits(model.eval(), BATCH, tasks=MIXED), logits(base_model("llama"), BATCH))
    assert torch.equal(logits(make_active(model), BATCH, tasks=MIXED), logits(expected, BATCH, tasks=MIXED))
    model.train()(**example_batch("llama"), tasks=MIXED).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())
