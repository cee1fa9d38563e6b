"""Which modules "all-linear" adapts, and layers that torch could pass over."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.support.helpers import adapter_config, base_model, gradients, make_active
from tests.support.tolerances import FLOAT64_MODEL

CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def siglip() -> SiglipVisionModel:
    """So many layers that PEFT shortens the list of names; its pooling head is an nn.MultiheadAttention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def adapted(base: nn.Module, **changes: Any) -> PeftModel:
    """On all linear layers, unless told otherwise."""
    torch.manual_seed(1)
    return make_active(get_peft_model(base, adapter_config(**{"target_modules": "all-linear"} | changes)))


@contextmanager
def told() -> Iterator[list[str]]:
    """What is said of modules that were left out."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(one.message) for one in caught if "leaves out" in str(one.message)]


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_all_linear_leaves_out_what_cannot_be_adapted_and_says_it_once(tmp_path: Path) -> None:
    left_out = "head.attention.out_proj"
    expected = linear_names(siglip()) - {left_out}
    with told() as said:
        model = adapted(siglip())
    assert said == [
        f"target_modules='all-linear' leaves out what hyperadapters cannot adapt: {left_out!r} (part of "
        "nn.MultiheadAttention, which reads its weight without calling it). List these modules in exclude_modules to "
        "silence this."
    ]
    assert set(model.base_model.targeted_module_names) == expected
    lora = get_peft_model(siglip(), LoraConfig(target_modules="all-linear"))
    assert set(lora.base_model.targeted_module_names) == expected | {left_out}
    # A file names what is adapted, so nothing is left out anew.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(siglip(), tmp_path).eval()
    for tasks in ("beta", ["alpha", "gamma", "beta"]):
        outputs = [one(pixel_values=PIXELS, tasks=tasks).pooler_output for one in (model, loaded)]
        assert torch.equal(*outputs)


def test_what_was_excluded_is_no_news() -> None:
    with told() as said:
        adapted(siglip(), exclude_modules=["head.attention.out_proj"])
    assert not said


def test_a_second_adapter_on_all_linear_layers_leaves_out_the_same() -> None:
    with told() as said:
        model = adapted(siglip())
        first = set(model.base_model.targeted_module_names)
        model.add_adapter("second", adapter_config(target_modules="ALL-LINEAR"))
    positions = model.base_model.router.network("second").positions
    assert {position.name for position in positions} == first
    assert len(said) == 2
    assert len(set(said)) == 1


@pytest.mark.parametrize("target_modules", [["out_proj"], r".*\.out_proj", ["head.attention.out_proj"]])
def test_a_module_named_outright_is_refused(target_modules: Any) -> None:
    base = siglip()
    with pytest.raises(TypeError, match=r"'head\.attention\.out_proj' is part of nn\.MultiheadAttention"):
        adapted(base, target_modules=target_modules)
    assert linear_names(base) == linear_names(siglip())


def test_a_model_of_which_nothing_can_be_adapted_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"'0\.out_proj' is part of nn\.MultiheadAttention"):
        adapted(nn.Sequential(nn.MultiheadAttention(4, 2)))


def test_nothing_is_left_out_of_other_models() -> None:
    with told() as said:
        for name in ("llama", "gpt2", "t5"):
            adapted(base_model(name))
    assert not said


def encoder() -> nn.Module:
    """A stack whose layers torch may run from their weights in evaluation."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).double()


@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_layer_of_torch_does_not_pass_over_its_layers(grad: bool) -> None:
    with told():
        model = adapted(encoder()).double()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks = ["beta", "alpha", "beta"]
    expected = model.train()(x, tasks=tasks)
    expected.square().sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    with torch.set_grad_enabled(grad):
        actual = model.eval()(x, tasks=tasks)
    assert_close(actual, expected, **CLOSE)
    if grad:
        actual.square().sum().backward()
        assert_close(gradients(model), expected_gradients, **CLOSE)
    with torch.no_grad(), model.disable_adapter():
        assert_close(model(x), encoder().eval()(x), **CLOSE)
    model.set_task("beta")
    with torch.no_grad():
        assert_close(model.merge_and_unload()(x)[::2], expected[::2], **CLOSE)


def padding() -> Tensor:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_tensor_is_refused_with_the_remedy() -> None:
    with told():
        model = adapted(encoder()).double()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = model.train()(x, src_key_padding_mask=padding(), tasks="beta")
    with torch.no_grad():
        with pytest.raises(TypeError, match="Set use_nested_tensor=False"):
            model.eval()(x, src_key_padding_mask=padding(), tasks="beta")
        model.get_base_model().use_nested_tensor = False
        actual = model(x, src_key_padding_mask=padding(), tasks="beta")
    assert_close(actual, expected, **CLOSE)
