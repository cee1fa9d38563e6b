"""Merging, disabling, several adapters, saving and loading, dtypes, and failures while a model is adapted."""

import re

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hyperadapt.tuner.layer import HyperAdapterLayer, layers_in
from tests.support.helpers import (
    ARCHITECTURES,
    MIXED,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    base_weights,
    double,
    example_batch,
    gradients,
    logits,
    make_active,
    snapshot,
    trainable,
    two_adapters,
)
from tests.support.tolerances import EPS_FLOAT64, FLOAT64_MODEL

BATCH = example_batch("llama", labels=False)
CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}


@pytest.fixture
def model() -> PeftModel:
    return adapted_model("llama").double()


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = base_weights(model)
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


@pytest.mark.parametrize("pinned", [None, "beta"], ids=["default", "pinned"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_live_and_unmerging_restores(name: str, pinned: str | None) -> None:
    model, batch = (
        adapted_model(name, default_task="gamma").double(),
        double(example_batch(name, labels=False)),
    )
    before, live = base_weights(model), logits(model, batch, tasks=pinned or "gamma")
    model.set_task(pinned or "gamma")
    if pinned is None:
        model.set_task(None)
        with pytest.warns(UserWarning, match="default task 'gamma' of 3"):
            model.merge_adapter(safe_merge=True)
    else:
        model.merge_adapter()
    assert_close(logits(model, batch), live, **CLOSE)
    assert_close(logits(model.get_base_model(), batch), live, **CLOSE)
    model.unmerge_adapter()
    for key, weight in base_weights(model).items():
        # Adding and subtracting the same update rounds twice, each time by half an ulp of the larger sum.
        largest = weight.abs().max() * (1 + model.peft_config["default"].normalization_bound)
        assert (weight - before[key]).abs().max() <= largest * EPS_FLOAT64 * 4, key
    assert_close(logits(model, batch, tasks=MIXED), logits(adapted_model(name).double(), batch, tasks=MIXED), **CLOSE)


def test_unmerging_subtracts_what_was_merged(model: PeftModel) -> None:
    before = base_weights(model)
    model.set_task("beta")
    model.merge_adapter()
    with pytest.raises(ValueError, match="so 'alpha' cannot be pinned"):
        model.set_task("alpha")
    make_active(model, seed=9)
    model.unmerge_adapter()
    for key, weight in base_weights(model).items():
        assert_close(weight, before[key], **CLOSE, msg=key)
    model.set_task("alpha")
    assert torch.equal(logits(model, BATCH), logits(model, BATCH, tasks="alpha"))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_merging_twice_warns_and_changes_nothing(model: PeftModel) -> None:
    model.set_task("beta")
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert_same_weights(model, merged)


def test_safe_merge_refuses_nan(model: PeftModel) -> None:
    before = base_weights(model)
    model.set_task("beta")
    # Only one shape breaks, after modules that could be merged.
    with torch.no_grad():
        model.base_model.router.network("default").hypernetwork.heads["A_48_r4"].weight[0] = torch.nan
    message = (
        "NaNs detected in the merged weights. The adapter default seems to be broken at module 'model.layers.0.mlp.down"
    )
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=re.escape(message)):
            merge(safe_merge=True)
        assert_same_weights(model, before)
        assert model.base_model.router.merged == {}
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, HyperAdapterLayer))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.merge(safe_merge=True)
    assert_same_weights(model, before)


@pytest.mark.parametrize("merge", [False, True], ids=["live", "merged"])
def test_disabled_equals_base(model: PeftModel, merge: bool) -> None:
    expected, live = logits(base_model("llama").double(), BATCH), logits(model, BATCH, tasks="beta")
    model.set_task("beta")
    if merge:
        model.merge_adapter()
    with model.disable_adapter():
        disabled = logits(model, BATCH)
        assert not gradients(model)
    if merge:
        assert_close(disabled, expected, **CLOSE)
    else:
        assert torch.equal(disabled, expected)
    assert_close(logits(model, BATCH), live, **CLOSE)


def test_unload_gives_the_base_model_back(model: PeftModel) -> None:
    base = model.unload()
    assert not any(isinstance(module, HyperAdapterLayer) for module in base.modules())
    assert_same_weights(base, base_weights(base_model("llama").double()))
    assert torch.equal(logits(base, BATCH), logits(base_model("llama").double(), BATCH))


def test_several_adapters_train_one_at_a_time() -> None:
    model = two_adapters().double()
    first, second = adapter_parameters(model), adapter_parameters(model, "second")
    assert trainable(model) == set(first)
    for adapter_name, names, task in (("second", second, "two"), ("default", first, "alpha")):
        model.zero_grad()
        model.set_adapter(adapter_name)
        assert trainable(model) == set(names)
        model(**example_batch("llama"), tasks=task).loss.backward()
        assert set(gradients(model)) == set(names)
    with pytest.raises(ValueError, match=r"Unknown task 'two'. Known tasks: \['alpha', 'beta', 'gamma'\]"):
        model(**BATCH, tasks="two")
    model.set_requires_grad("second")
    assert trainable(model) == {*first, *second}
    model.set_adapter("second", inference_mode=True)
    assert trainable(model) == set()


def test_an_added_adapter_leaves_the_first_as_it_was(model: PeftModel) -> None:
    state, mixed = snapshot(model), logits(model, BATCH, tasks=MIXED)
    model.base_model.set_adapter("default", inference_mode=True)
    model.add_adapter("second", adapter_config(target_modules=["k_proj"]))
    assert trainable(model) == set()
    assert torch.equal(logits(model, BATCH, tasks=MIXED), mixed)
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_all_linear_includes_modules_that_are_already_adapted() -> None:
    model = adapted_model("llama", target_modules=["q_proj", "down_proj"])
    model.add_adapter("second", adapter_config(target_modules="all-linear"))
    networks = model.base_model.router.networks
    everything = adapted_model("llama").base_model.router.network("default").positions
    assert networks["second"].positions == everything
    assert len(networks["default"].positions) == 4


def test_active_together_and_deleted() -> None:
    model = two_adapters().double()
    alone = {}
    for adapter_name, task in (("default", "beta"), ("second", "two")):
        model.set_adapter(adapter_name)
        model.set_task(task)
        alone[adapter_name] = logits(model, BATCH)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, BATCH)
    # Set on the layers alone, past the model, as PEFT's own tests do.
    model.set_adapter("default")
    for layer in layers_in(model):
        layer.set_adapter(["default", "second"])
    assert_close(logits(model, BATCH), both, **CLOSE)
    model.merge_adapter()
    assert_close(logits(model, BATCH), both, **CLOSE)
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "second"])
    assert all((both - logits_alone).abs().max() > 0.01 for logits_alone in alone.values())
    model.merge_adapter()
    assert_close(logits(model, BATCH), both, **CLOSE)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['second'\] while they are merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert adapter_parameters(model, "second") == {}
    assert set(model.base_model.router.pinned) == {"default"}
    assert model.active_adapters == ["default"]
    assert_close(logits(model, BATCH), alone["default"], **CLOSE)
    model.add_adapter("second", adapter_config(tasks=["one"], target_modules=["o_proj"]))
    model.set_adapter("second")
    assert_close(logits(model, BATCH), logits(base_model("llama").double(), BATCH), **CLOSE)
    # Without any adapter, the layers that are left are the base model's.
    model.delete_adapter("default")
    assert torch.equal(logits(model, BATCH), logits(base_model("llama").double(), BATCH))


# What is asked for, the exception, and what it says.
FAILURES: dict[str, tuple[dict, type[Exception], str]] = {
    "layer norm": (
        {"target_modules": ["q_proj", "input_layernorm"]},
        TypeError,
        "Module 'model.layers.0.input_layernorm' is of type LlamaRMSNorm, which hyperadapters cannot adapt",
    ),
    "nothing": (
        {"target_modules": ["qproj"]},
        ValueError,
        "Target modules {'qproj'} not found in the base model",
    ),
    "zeros": (
        {"target_modules": ["q_proj", "up_proj"]},
        ValueError,
        "The weight of module 'model.layers.1.mlp.up_proj' has Frobenius norm 0.0",
    ),
    "nan": (
        {"target_modules": ["q_proj", "down_proj"]},
        ValueError,
        "The weight of module 'model.layers.1.mlp.down_proj' has Frobenius norm nan",
    ),
    "meta": (
        {"target_modules": ["q_proj", "o_proj"]},
        ValueError,
        "The weight of module 'model.layers.1.self_attn.o_proj' is on the meta device",
    ),
}


def spoil(base: nn.Module, case: str) -> None:
    block = base.model.layers[1]
    if case == "zeros":
        nn.init.zeros_(block.mlp.up_proj.weight)
    elif case == "nan":
        nn.init.constant_(block.mlp.down_proj.weight, torch.nan)
    elif case == "meta":
        block.self_attn.o_proj.to("meta")


def adapt(model: nn.Module, config: PeftConfig) -> None:
    if isinstance(model, PeftModel):
        model.add_adapter("second", config)
    else:
        get_peft_model(model, config)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_leave_the_model_as_it_was(case: str, second: bool) -> None:
    changes, error, message = FAILURES[case]
    model = adapted_model("llama", target_modules=["q_proj", "k_proj"]) if second else base_model("llama")
    routing = {"tasks": MIXED} if second else {}
    expected = logits(model, BATCH, **routing)
    if not second:
        model.lm_head.requires_grad_(False)
    spoil(model.get_base_model() if second else model, case)
    types = [(name, type(module)) for name, module in model.named_modules()]
    trained, tensors = trainable(model), model.state_dict(keep_vars=True)
    with pytest.raises(error, match=re.escape(message)):
        adapt(model, adapter_config(**changes))
    assert [(name, type(module)) for name, module in model.named_modules()] == types
    assert trainable(model) == trained
    assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())
    if second:
        assert list(model.peft_config) == ["default"]
    if case in ("layer norm", "nothing"):
        assert torch.equal(logits(model, BATCH, **routing), expected)


def test_a_failure_can_be_mended() -> None:
    base = base_model("llama")
    with pytest.raises(TypeError, match="LlamaRMSNorm"):
        get_peft_model(base, adapter_config(target_modules=["q_proj", "norm"]))
    torch.manual_seed(1)
    model = make_active(get_peft_model(base, adapter_config(target_modules="all-linear")))
    assert torch.equal(logits(model, BATCH, tasks=MIXED), logits(adapted_model("llama"), BATCH, tasks=MIXED))
