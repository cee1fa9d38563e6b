"""Embeddings, convolutions and several ranks: the same promises as for linear layers, against dense updates."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hyperadapt import HyperAdapterConfig, export_lora
from hyperadapt.config import HEADS
from hyperadapt.normalization import NORMALIZATIONS
from tests.support.helpers import (
    MIXED,
    ROWS,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    logits,
    make_active,
    varied,
)
from tests.support.tolerances import EXPORT_FLOAT32, FLOAT64_MODEL

CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}


class Net(nn.Module):
    """One layer of a type between two linear ones, so that its input has a gradient where it can."""

    def __init__(self, layer: nn.Module, ending: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.ending = ending

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(self.layer(x).flatten(1))


def ids() -> Tensor:
    return torch.randint(0, 10, (ROWS, 5), generator=torch.Generator().manual_seed(0))


def images(*size: int) -> Tensor:
    return torch.randn(ROWS, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# The layer, its input, and the size of its output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), ids, 30),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2), lambda: images(3, 9), 24),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), padding=(1, 0), dilation=2), lambda: images(3, 6, 5), 72),
    "conv2d 1x1": (lambda: nn.Conv2d(3, 6, 1, bias=False), lambda: images(3, 2, 2), 24),
    "conv2d same": (lambda: nn.Conv2d(3, 6, 3, padding="same"), lambda: images(3, 3, 2), 36),
    "conv2d circular": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        lambda: images(3, 3, 3),
        54,
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: images(2, 3, 3, 2), 24),
}


def net(name: str) -> Net:
    make, _, size = LAYERS[name]
    torch.manual_seed(0)
    return Net(make(), nn.Linear(size, 3)).double()


def adapted(name: str, *, active: bool = True, **changes: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(net(name), adapter_config(**{"target_modules": ["layer"], "r": 2} | changes)).double()
    return make_active(model) if active else model


@pytest.mark.parametrize(("name", "normalization"), varied(("conv2d", "soft_frobenius"), LAYERS, NORMALIZATIONS))
def test_training_starts_exactly_at_the_base_model(name: str, normalization: str) -> None:
    x = LAYERS[name][1]()
    model = adapted(name, active=False, normalization=normalization)
    assert torch.equal(model(x, tasks=MIXED), net(name)(x))


@pytest.mark.parametrize(("name", "head"), varied(("embedding", "factor"), LAYERS, HEADS))
def test_a_mixed_batch_equals_dense_updates_with_their_gradients(name: str, head: str) -> None:
    x = LAYERS[name][1]()
    if x.is_floating_point():
        x.requires_grad_()
    model = adapted(name, head=head)
    wanted = [p for p in (*model.parameters(), x) if p.requires_grad]
    direction = torch.randn(ROWS, 3, dtype=torch.float64)
    actual = model(x, tasks=MIXED)

    layer = model.base_model.model.layer
    router, base = layer.router, net(name)
    outputs = []
    for row, task in enumerate(MIXED):
        factors = router.factors_of_task("default", task)["layer"]
        dense = factors.delta_weight()[0]
        assert dense.abs().max() > 0.01
        # A padding index keeps its embedding.
        padding = torch.tensor([0])
        update = dense.T.index_fill(0, padding, 0) if name == "embedding" else dense.reshape(base.layer.weight.shape)
        weight = base.layer.weight.detach() + update
        buffers = {f"layer.{key}": value for key, value in base.layer.named_parameters() if key != "weight"}
        outputs.append(torch.func.functional_call(base, {"layer.weight": weight, **buffers}, (x[row : row + 1],)))
    expected = torch.cat(outputs)
    assert_close(actual, expected, **CLOSE)
    gradients = torch.autograd.grad(actual, wanted, direction, allow_unused=True)
    expected_gradients = torch.autograd.grad(expected, wanted, direction, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert_close(gradients, expected_gradients, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_merging_and_one_task_equal_the_mixed_batch(name: str) -> None:
    x = LAYERS[name][1]()
    model = adapted(name)
    with torch.no_grad():
        mixed = model(x, tasks=MIXED)
        alone = model(x, tasks="beta")
        assert_close(alone[[0, 3]], mixed[[0, 3]], **CLOSE)
        model.set_task("beta")
        assert_close(model(x), alone, **CLOSE)
        model.merge_adapter()
        assert_close(model(x), alone, **CLOSE)
        model.unmerge_adapter()
        assert_close(model(x), alone, **CLOSE)
        unloaded = model.merge_and_unload()
        assert type(unloaded.layer) is type(net(name).layer)
        assert_close(unloaded(x), alone, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_an_export_is_the_same_in_plain_peft(name: str, tmp_path: Path) -> None:
    x = LAYERS[name][1]()
    model = adapted(name)
    # PEFT's LoRA ignores the dilation and padding mode of the base layer; merged into its weight it is right.
    is_uncommon = name in ("conv2d", "conv2d circular")
    told = pytest.warns(UserWarning, match=r"\['layer'\], which have a dilation or padding mode. PEFT computes")
    with told if is_uncommon else nullcontext():
        export_lora(model, "beta", tmp_path)
    lora = PeftModel.from_pretrained(net(name), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    with torch.no_grad():
        expected, base = model(x, tasks="beta"), net(name)(x)
        assert (expected - base).abs().max() > 0.1
        if is_uncommon:
            lora = lora.merge_and_unload()
        assert_close(lora(x), expected, rtol=EXPORT_FLOAT32, atol=EXPORT_FLOAT32)


@pytest.mark.parametrize("name", LAYERS)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    x = LAYERS[name][1]()
    model = adapted(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(name), tmp_path).double()
    assert torch.equal(loaded(x, tasks=MIXED), model.eval()(x, tasks=MIXED))


def test_a_convolution_without_batch() -> None:
    x = images(3, 6, 5)
    model = adapted("conv2d")
    layer = model.base_model.model.layer
    model.set_task("beta")
    with torch.no_grad():
        assert_close(layer(x[0]), layer(x)[0], **CLOSE)


def test_a_scaled_embedding_scales_the_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    torch.manual_seed(0)
    base = Net(Scaled(10, 6), nn.Linear(30, 3)).double()
    model = make_active(get_peft_model(base, adapter_config(target_modules=["layer"], r=2)).double())
    model.set_task("beta")
    with torch.no_grad():
        expected = model(ids())
        model.merge_adapter()
        assert_close(model(ids()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("head", "normalization"), varied(("row", "sinkhorn"), HEADS, ["soft_frobenius", "whitening", "sinkhorn"])
)
def test_ranks_and_scalings_by_pattern(head: str, normalization: str, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"down_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"o_proj": 1},
    }
    model = adapted_model("llama", head=head, normalization=normalization, **patterns)
    ranks = {
        name: one.lora_A.shape[-2] for name, one in model.base_model.router.factors_of_task("default", "beta").items()
    }
    assert ranks.pop("model.layers.1.self_attn.q_proj") == 6
    assert ranks == {name: 2 if name.endswith("down_proj") else 4 for name in ranks}
    network = model.base_model.router.network("default")
    scalings = {position.name: position.scaling for position in network.positions}
    assert scalings["model.layers.0.self_attn.o_proj"] == 1 / 4
    assert scalings["model.layers.0.mlp.down_proj"] == 8 / 2
    assert scalings["model.layers.0.mlp.up_proj"] == 8 / 4

    batch = example_batch("llama", labels=False)
    with torch.no_grad():
        mixed = logits(model.double(), batch, tasks=MIXED)
        for row, task in enumerate(MIXED):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            assert_close(logits(model, one, tasks=task)[0], mixed[row], **CLOSE)
    export_lora(model, "beta", tmp_path)
    lora = PeftModel.from_pretrained(base_model("llama").double(), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(logits(lora, batch), logits(model, batch, tasks="beta"), **CLOSE)


def test_a_scaling_by_pattern_is_that_scaling_everywhere() -> None:
    torch.manual_seed(0)
    common = {"init_weights": False, "normalization": "none"}
    plain = adapted_model("llama", active=False, alpha_pattern={"q_proj": 3.0}, **common)
    factors = plain.base_model.router.factors_of_task("default", "beta")
    for name, one in factors.items():
        assert one.core.tolist() == [[[0.75 if name.endswith("q_proj") else 2.0]]], name


@pytest.mark.parametrize(
    ("module", "target", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "layer", "Module 'layer' is a convolution with groups=2"),
        (nn.MultiheadAttention(4, 2), "layer", "Module 'layer' is of type MultiheadAttention"),
        (nn.MultiheadAttention(4, 2), "out_proj", "Module 'layer.out_proj' is part of nn.MultiheadAttention"),
        (nn.EmbeddingBag(4, 2), "layer", "Module 'layer' is of type EmbeddingBag"),
        (nn.Bilinear(2, 2, 2), "layer", "Module 'layer' is of type Bilinear"),
    ],
    ids=["groups", "attention", "out_proj", "bag", "bilinear"],
)
def test_other_layers_are_refused(module: nn.Module, target: str, message: str) -> None:
    base = Net(module, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=re.escape(message)):
        get_peft_model(base, HyperAdapterConfig(target_modules=[target]))
    assert base.layer is module
