"""Several models made from one base model, as notebooks do: the one made last is right, the others are or say so."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from torch.testing import assert_close

from tests.support.helpers import (
    MIXED,
    adapter_config,
    base_model,
    example_batch,
    gradients,
    logits,
    make_active,
    snapshot,
    trainable,
)

BATCH = example_batch("llama", labels=False)

# PEFT's own; ours, of an adapter that is replaced, is an error here unless a test asks for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
REPLACED = (
    r"^Adapter '{}' of this base model is replaced: models made from it before now use the new one\. Pass another"
)

# What the second adapter has other than the first, which adapts q_proj and up_proj with rank 4.
SECOND: dict[str, dict[str, Any]] = {
    "same": {},
    "rank": {"r": 2},
    "overlap": {"target_modules": ["q_proj", "down_proj"]},
    "disjoint": {"target_modules": ["v_proj"]},
    "more": {"target_modules": "all-linear"},
    "head": {"modules_to_save": ["lm_head"]},
    "tasks": {"tasks": ["beta", "alpha", "gamma", "delta"]},
}
FIRST = {"target_modules": ["q_proj", "up_proj"]}


def adapted(base: nn.Module, seed: int, adapter_name: str = "default", **changes: Any) -> PeftModel:
    """A model made from a base model; replacing an adapter has to warn."""
    torch.manual_seed(seed)
    is_taken = adapter_name in getattr(base, "peft_config", {})
    with pytest.warns(UserWarning, match=REPLACED.format(adapter_name)) if is_taken else nullcontext():
        return make_active(get_peft_model(base, adapter_config(**(FIRST | changes)), adapter_name), seed)


def saved(folder: Path, seed: int, **changes: Any) -> torch.Tensor:
    """An adapter's folder, and its outputs."""
    model = adapted(base_model("llama"), seed, **changes)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return logits(model, BATCH, tasks=MIXED)


def load(base: nn.Module, folder: Path, adapter_name: str = "default", **options: Any) -> PeftModel:
    is_taken = adapter_name in getattr(base, "peft_config", {})
    with pytest.warns(UserWarning, match=REPLACED.format(adapter_name)) if is_taken else nullcontext():
        return PeftModel.from_pretrained(base, folder, adapter_name, **options)


@pytest.mark.parametrize(
    ("case", "adapter_name", "low_cpu_mem_usage"),
    [
        *((case, name, False) for case in SECOND for name in ("default", "other")),
        ("overlap", "default", True),
        ("head", "other", True),
    ],
)
def test_the_model_loaded_last_is_right(tmp_path: Path, case: str, adapter_name: str, low_cpu_mem_usage: bool) -> None:
    expected_first = saved(tmp_path / "a", 1, modules_to_save=["embed_tokens"])
    expected = saved(tmp_path / "b", 2, **SECOND[case])
    base = base_model("llama")
    plain = logits(base, BATCH)
    first = load(base, tmp_path / "a")
    assert torch.equal(logits(first, BATCH, tasks=MIXED), expected_first)
    second = load(base, tmp_path / "b", adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(second, BATCH, tasks=MIXED), expected)
    with second.disable_adapter():
        assert torch.equal(logits(second, BATCH, tasks=MIXED), plain)
    if adapter_name == "default":
        # As with PEFT's LoRA: there is one adapter of the name.
        assert torch.equal(logits(first, BATCH, tasks=MIXED), expected)
    else:
        with pytest.raises(RuntimeError, match=r"^Adapter 'other' is active in the layers, but this model uses 'defa"):
            logits(first, BATCH, tasks=MIXED)
        first.set_adapter("default")
        assert torch.equal(logits(first, BATCH, tasks=MIXED), expected_first)
        with pytest.raises(RuntimeError, match=r"^Adapter 'default' is active in the layers, but this model uses 'oth"):
            logits(second, BATCH, tasks=MIXED)
        with pytest.raises(RuntimeError, match=r"^Adapter 'default' is active in the layers"):
            second.merge_adapter()
        second.set_adapter("other")
    second.save_pretrained(tmp_path / "c", selected_adapters=[adapter_name])
    folder = tmp_path / "c" if adapter_name == "default" else tmp_path / "c" / "other"
    assert torch.equal(logits(load(base_model("llama"), folder), BATCH, tasks=MIXED), expected)
    second.set_task("gamma")
    pinned = logits(second, BATCH)
    assert torch.equal(pinned[0], logits(second, BATCH, tasks="gamma")[0])
    merged = second.merge_and_unload()
    assert merged is base
    assert not any(type(module).__module__.startswith(("hyperadapt", "peft")) for module in base.modules())
    assert not base._forward_pre_hooks
    assert_close(logits(base, BATCH), pinned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "names", [("default", "default", "default"), ("one", "two", "three")], ids=["same name", "names"]
)
@pytest.mark.parametrize("case", ["same", "overlap", "head"])
def test_the_model_made_last_trains(case: str, names: tuple[str, ...]) -> None:
    batch = example_batch("llama")
    alone = adapted(base_model("llama"), 5, **SECOND[case]).train()
    alone(**batch, tasks=MIXED).loss.backward()
    expected = gradients(alone)
    base = base_model("llama")
    for seed, adapter_name in enumerate(names[:-1]):
        adapted(base, seed, adapter_name, modules_to_save=["norm"])
    model = adapted(base, 5, names[-1], **SECOND[case]).train()
    set_peft_model_state_dict(model, get_peft_model_state_dict(alone), names[-1])
    model(**batch, tasks=MIXED).loss.backward()
    assert trainable(model) == set(gradients(model))
    found = {name.replace(f".{names[-1]}.", ".default."): one for name, one in gradients(model).items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], gradient) and gradient.any() for name, gradient in expected.items())


def assert_unchanged(base: nn.Module, change: Callable[[], Any], error: type[Exception], match: str) -> None:
    """A change fails and leaves modules, tensors, flags, adapters and hooks as they were."""

    def state() -> tuple[Any, ...]:
        modules = [(name, id(module)) for name, module in base.named_modules()]
        flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        configs = {name: id(config) for name, config in getattr(base, "peft_config", {}).items()}
        return modules, flags, configs, list(base._forward_pre_hooks)

    before, tensors = state(), snapshot(base)
    with pytest.raises(error, match=match):
        change()
    assert state() == before
    after = base.state_dict()
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


@pytest.mark.filterwarnings("ignore:Adapter 'default' of this base model is replaced")
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_a_second_model_that_fails_leaves_the_first_as_it_was(tmp_path: Path, adapter_name: str) -> None:
    base = base_model("llama")
    first = adapted(base, 1, modules_to_save=["lm_head"])
    first.set_task("beta")
    expected, pinned = logits(first, BATCH, tasks=MIXED), logits(first, BATCH)
    trained, networks = trainable(first), list(first.base_model.hyperadapter_networks.values())
    saved(tmp_path / "b", 2, modules_to_save=["embed_tokens"])
    weights = tmp_path / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    bad = adapter_config(target_modules=["q_proj", "norm"], modules_to_save=["embed_tokens"])
    large = adapter_config(target_modules=["q_proj", "v_proj"], r=64, hypernetwork_dim=65536)
    changes: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: get_peft_model(base, bad, adapter_name), TypeError, "of type LlamaRMSNorm"),
        (lambda: get_peft_model(base, large, adapter_name), ValueError, "more than the limit of"),
        (lambda: PeftModel.from_pretrained(base, tmp_path / "b", adapter_name), SafetensorError, "incomplete"),
        (
            lambda: PeftModel.from_pretrained(first, tmp_path / "b", adapter_name),
            ValueError,
            "is not the base model of",
        ),
        (
            lambda: get_peft_model(first, bad, adapter_name),
            ValueError,
            r"PeftModel\w* is not the base model of the hyp",
        ),
        (lambda: get_peft_model(base.model, bad, adapter_name), ValueError, "^LlamaModel is not the base model of the"),
        (lambda: get_peft_model(nn.Sequential(first), bad), ValueError, "^Sequential is not the base model of the"),
    ]
    for change, error, match in changes:
        assert_unchanged(base, change, error, match)
        assert torch.equal(logits(first, BATCH, tasks=MIXED), expected)
        assert torch.equal(logits(first, BATCH), pinned)
        assert trainable(first) == trained
        assert list(first.base_model.hyperadapter_networks.values()) == networks
    second = adapted(base, 3, adapter_name)
    expected = logits(adapted(base_model("llama"), 3), BATCH, tasks=MIXED)
    set_peft_model_state_dict(second, get_peft_model_state_dict(adapted(base_model("llama"), 3)), adapter_name)
    assert torch.equal(logits(second, BATCH, tasks=MIXED), expected)


def test_no_second_model_on_merged_weights() -> None:
    base = base_model("llama")
    first = adapted(base, 1)
    first.set_task("beta")
    first.merge_adapter()
    for adapter_name in ("default", "other"):
        assert_unchanged(
            base,
            lambda name=adapter_name: get_peft_model(base, adapter_config(**FIRST), name),
            ValueError,
            "^Task 'beta' of adapter 'default' is merged into the weights of this base model",
        )
    first.unmerge_adapter()
    adapted(base, 2, "other")


def test_a_second_model_is_enabled_and_unpinned() -> None:
    base = base_model("llama")
    first = adapted(base, 1)
    first.set_task("beta")
    first.base_model.disable_adapter_layers()
    expected = logits(adapted(base_model("llama"), 2), BATCH, tasks="alpha")
    second = adapted(base, 2)
    with pytest.warns(UserWarning, match="default task 'alpha' of 3"):
        assert torch.equal(logits(second, BATCH), expected)


def test_an_unloaded_model_says_so_once_its_base_model_is_adapted_anew() -> None:
    base = base_model("llama")
    plain = logits(base, BATCH)
    first = adapted(base, 1)
    second = adapted(base, 1, "other")
    assert first.unload() is base
    assert torch.equal(logits(first, BATCH, tasks=MIXED), plain)
    third = adapted(base, 2)
    expected = logits(third, BATCH, tasks=MIXED)
    for stale in (first, second):
        for use in (lambda one: logits(one, BATCH), lambda one: one.merge_adapter(), lambda one: one.unload()):
            with pytest.raises(
                ValueError, match=r"^This model was unloaded, and another one has been made from its base"
            ):
                use(stale)
    assert torch.equal(logits(third, BATCH, tasks=MIXED), expected)


def test_a_copy_of_an_adapted_base_model_is_a_base_model_of_its_own(tmp_path: Path) -> None:
    expected = saved(tmp_path, 2)
    base = base_model("llama")
    first = adapted(base, 1)
    before = logits(first, BATCH, tasks=MIXED)
    second = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(second, BATCH, tasks=MIXED), expected)
    assert torch.equal(logits(first, BATCH, tasks=MIXED), before)
    copied = copy.deepcopy(second)
    third = adapted(copied.get_base_model(), 3)
    assert torch.equal(logits(third, BATCH, tasks=MIXED), logits(copied, BATCH, tasks=MIXED))
    assert torch.equal(logits(second, BATCH, tasks=MIXED), expected)


def test_what_a_failed_load_needs_is_not_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    base = base_model("llama")
    for model in (load(base, tmp_path), adapted(base, 2), load(base, tmp_path)):
        assert "before_loading" not in vars(model.base_model)


def test_deleting_an_adapter_of_the_other_model() -> None:
    base = base_model("llama")
    first = adapted(base, 1, "one")
    second = adapted(base, 2, "two")
    first.set_adapter("one")
    expected = logits(first, BATCH, tasks=MIXED)
    second.set_adapter("two")
    with pytest.warns(UserWarning, match="Adapter two was active which is now deleted. Setting active adapter to one"):
        second.delete_adapter("two")
    assert torch.equal(logits(first, BATCH, tasks=MIXED), expected)
