"""Which task is merged, when the base weights have it, and which weights cannot take one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from transformers import PreTrainedModel

from hyperadapt import use_tasks
from hyperadapt.tuner.layer import layers_in
from tests.support.experts import MIXTURES, adapted, mixture, token_ids
from tests.support.helpers import (
    MIXED,
    TASKS,
    adapted_model,
    adapter_config,
    base_model,
    base_weights,
    example_batch,
    logits,
    make_active,
    two_adapters,
)
from tests.support.tolerances import FLOAT64_MODEL

BATCH = example_batch("llama", labels=False)
CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}
OTHER_TASK = "^Task 'beta' of adapter 'default' is merged into the base weights, so no other task can be used"


@pytest.fixture
def model() -> PeftModel:
    return adapted_model("llama").double()


@pytest.mark.parametrize("tasks", ["beta", ["beta"] * 4, torch.tensor([1, 1, 1, 1])], ids=["name", "names", "ids"])
@pytest.mark.parametrize("pinned", [None, "gamma"])
def test_the_task_of_use_tasks_is_merged(model: PeftModel, pinned: str | None, tasks: Any) -> None:
    expected, layer = logits(model, BATCH, tasks="beta"), layers_in(model)[0]
    model.set_task("beta")
    update = layer.get_delta_weight("default")
    model.set_task(pinned)
    with use_tasks(model, tasks):
        assert torch.equal(layer.get_delta_weight("default"), update)
        assert model.active_task == "beta"
        unloaded = copy.deepcopy(model)
        model.merge_adapter(safe_merge=True)
    assert_close(logits(model, BATCH), expected, **CLOSE)
    assert (model.base_model.router.merged, model.active_task) == ({"default": "beta"}, "beta")
    with use_tasks(unloaded, tasks):
        assert_close(logits(unloaded.merge_and_unload(), BATCH), expected, **CLOSE)
    model.unmerge_adapter()
    assert model.active_task == (pinned or "alpha")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": MIXED}, "use_tasks asks for the tasks ['beta', 'alpha', 'gamma'], but one must be in force for all"),
        ({"task_embeddings": torch.ones(8)}, "use_tasks asks for task_embeddings, but one task must be in force"),
    ],
    ids=["mixed", "embedding"],
)
def test_what_names_no_single_task_is_not_merged(model: PeftModel, asked: dict[str, Any], message: str) -> None:
    before = base_weights(model)
    layer = layers_in(model)[0]
    model.set_task("gamma")
    with use_tasks(model, **asked):
        for act in (model.merge_adapter, model.merge_and_unload, lambda: layer.get_delta_weight("default")):
            with pytest.raises(ValueError, match=re.escape(message)):
                act()
    assert model.base_model.router.merged == {}
    assert_close(base_weights(model), before, rtol=0, atol=0)


def test_a_task_that_one_adapter_does_not_know_is_not_merged_into_any() -> None:
    model = two_adapters()
    before = base_weights(model)
    model.base_model.set_adapter(["default", "second"])
    model.set_adapter("default")
    with use_tasks(model, "beta"), pytest.raises(ValueError, match=r"^Unknown task 'beta'. Known tasks: \['one', 'tw"):
        model.merge_adapter(["default", "second"])
    assert_close(base_weights(model), before, rtol=0, atol=0)


def test_a_merged_task_is_not_taken_for_another_of_use_tasks(model: PeftModel) -> None:
    model.set_task("beta")
    model.merge_adapter()
    with use_tasks(model, "gamma"):
        for act in (model.merge_adapter, model.merge_and_unload, lambda: model.get_base_model()(**BATCH)):
            with pytest.raises(ValueError, match=OTHER_TASK):
                act()
    with use_tasks(model, "beta"):
        model.get_base_model()(**BATCH)


def test_disabling_unmerges_layers_that_no_call_reaches() -> None:
    model, batch = adapted_model("t5").double(), example_batch("t5", labels=False)
    expected = logits(model, batch, tasks="gamma")
    before = base_weights(model)
    model.set_task("beta")
    model.merge_adapter()
    states = model.get_encoder()(batch["input_ids"])
    with model.disable_adapter():
        model(encoder_outputs=states, decoder_input_ids=batch["decoder_input_ids"])
        assert_close(base_weights(model), before, **CLOSE)
    assert (model.base_model.router.merged, model.get_model_status().merged_adapters) == ({}, [])
    assert_close(logits(model, batch, tasks="gamma"), expected, **CLOSE)


def unmerge(model: PeftModel) -> None:
    model.unmerge_adapter()


def set_the_adapter(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")


def disable(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def unmerge_each(model: PeftModel) -> None:
    for layer in layers_in(model):
        layer.unmerge()


@pytest.mark.parametrize("undo", [unmerge, set_the_adapter, disable, unmerge_each])
@pytest.mark.parametrize("kind", ["modules", "experts"])
def test_offloaded_weights_are_merged_and_unmerged(kind: str, undo: Callable[[PeftModel], None]) -> None:
    base = mixture() if kind == "experts" else base_model("llama").double()
    batch = {"input_ids": token_ids(3)}
    accelerate.cpu_offload(base, execution_device="cpu")
    changes: dict[str, Any] = {} if kind == "experts" else {"target_modules": ["q_proj"], "target_parameters": None}
    model = adapted(base, **changes)
    expected = {task: logits(model, batch, tasks=task) for task in TASKS}
    model.set_task("beta")
    model.merge_adapter()
    assert_close(logits(model, batch), expected["beta"], **CLOSE)
    undo(model)
    assert_close(logits(model, batch, tasks="gamma"), expected["gamma"], **CLOSE)
    assert all(layer.weight.is_meta for layer in layers_in(model))
    assert_close(logits(model.merge_and_unload(), batch), expected["beta"], **CLOSE)


def test_other_tasks_wait_for_the_last_layer(model: PeftModel) -> None:
    expected = {task: logits(model, BATCH, tasks=task) for task in TASKS}
    model.set_task("beta")
    model.merge_adapter()
    layers = layers_in(model)
    for layer in layers:
        with pytest.raises(ValueError, match=OTHER_TASK):
            logits(model, BATCH, tasks="gamma")
        assert_close(logits(model, BATCH), expected["beta"], **CLOSE)
        layer.unmerge()
    assert_close(logits(model, BATCH, tasks="gamma"), expected["gamma"], **CLOSE)


def assert_trains(model: nn.Module, batch: dict[str, Tensor], **routing: Any) -> None:
    model.train().requires_grad_(True)
    model(**batch, **routing).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "proj" in name)


@pytest.mark.parametrize("unload", [False, True])
def test_weights_that_were_merged_in_inference_mode_train(model: PeftModel, unload: bool) -> None:
    model.set_task("beta")
    with torch.inference_mode():
        merged = model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter()
    if not unload:
        with torch.inference_mode(), model.disable_adapter():
            model(**BATCH)
    assert_trains(merged if unload else model, example_batch("llama"), **({} if unload else {"tasks": "gamma"}))
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_experts_that_were_merged_in_inference_mode_train() -> None:
    model, ids = adapted(mixture(next(iter(MIXTURES)))), token_ids(3)
    model.base_model.set_task(TASKS[1])
    with torch.inference_mode():
        merged = model.merge_and_unload()
    merged.train().requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    assert not any(parameter.is_inference() for parameter in merged.parameters())


def tied(name: str) -> PreTrainedModel:
    config = base_model(name).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return type(base_model(name))(config).eval()


# The base model, the adapted module, and the others with its weight.
TIED = {
    "head": ("llama", "lm_head", ["model.embed_tokens"]),
    "embeddings": ("llama", "model.embed_tokens", ["lm_head"]),
    "t5": ("t5", "shared", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize("case", TIED)
def test_a_tied_weight_is_not_merged(case: str) -> None:
    name, target, others = TIED[case]
    model = make_active(get_peft_model(tied(name), adapter_config(target_modules=[target])))
    before = base_weights(model)
    model.set_task("beta")
    message = f"The weight of '{target}' is also that of {others}, which merging would change, too, but the adapter "
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=re.escape(message) + ".*export_lora"):
            merge()
    assert_close(base_weights(model), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_a_weight_whose_other_module_is_trained_in_full_is_merged() -> None:
    config = adapter_config(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    model = make_active(get_peft_model(tied("llama").double(), config))
    model.set_task("beta")
    expected = logits(model, BATCH)
    model.merge_adapter()
    assert_close(logits(model, BATCH), expected, **CLOSE)
    model.unmerge_adapter()
    assert_close(logits(model.merge_and_unload(), BATCH), expected, **CLOSE)


class Shared(nn.Module):
    """One layer under two names, of which PEFT wraps the first alone; and a block under two, which it reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.heads = nn.ModuleList([self.first])
        self.block = nn.Sequential(nn.Linear(6, 6))
        self.again = nn.Sequential(self.block)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.first(self.again(self.block(x))))


def test_a_layer_under_two_names_is_not_merged() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    model = make_active(get_peft_model(Shared().double(), adapter_config(target_modules=["first"])))
    model.set_task("beta")
    with pytest.raises(ValueError, match=r"^The weight of 'first' is also that of \['heads.0'\], which merging would"):
        model.merge_adapter()
    model = make_active(get_peft_model(Shared().double(), adapter_config(target_modules=["block.0"])))
    model.set_task("beta")
    expected = model(x)
    model.merge_adapter()
    assert_close(model(x), expected, **CLOSE)


def test_a_weight_that_is_computed_is_not_merged() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = make_active(get_peft_model(Net(), adapter_config(target_modules=["layer"])))
    model.set_task("beta")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"^The weight of 'layer' is computed from other parameters.*export_lora"):
            merge()
