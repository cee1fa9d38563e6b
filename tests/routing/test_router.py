"""Which task each row uses, whatever way it is asked for, and what is left behind (nothing)."""

import contextlib
import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from hyperadapt import use_tasks
from hyperadapt.routing import kept_factors
from hyperadapt.routing import requests as requests_module
from hyperadapt.tasks import ids as ids_module
from tests.support.helpers import (
    ARCHITECTURES,
    MIXED,
    ROWS,
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    double,
    example_batch,
    gradients,
    logits,
    make_active,
    row_of,
)
from tests.support.tolerances import FLOAT32_FORWARD, FLOAT64_MODEL

BATCH = example_batch("llama", labels=False)
IDS = torch.tensor([TASKS.index(task) for task in MIXED])


@pytest.fixture(scope="module")
def shared() -> PeftModel:
    """For tests that leave the model as it was."""
    return adapted_model("llama", default_task="gamma")


@pytest.fixture
def model() -> PeftModel:
    return adapted_model("llama", default_task="gamma")


def expect(model: PeftModel, tasks: Any) -> Tensor:
    return logits(model, BATCH, tasks=tasks)


def network_calls(model: PeftModel) -> list[int]:
    """A list that grows with every call of the network."""
    calls: list[int] = []
    model.base_model.router.network("default").register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_tasks_differ_and_every_way_to_name_them_agrees(shared: PeftModel) -> None:
    one_each = [expect(shared, task) for task in TASKS]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(one_each))
    mixed = expect(shared, IDS)
    for same in (MIXED, tuple(MIXED), IDS.int(), IDS.to(torch.uint8)):
        assert torch.equal(expect(shared, same), mixed)
    with use_tasks(shared, MIXED):
        assert torch.equal(logits(shared, BATCH), mixed)
    for same in (["beta"] * ROWS, torch.ones(ROWS, dtype=torch.long)):
        assert torch.equal(expect(shared, same), expect(shared, "beta"))
    with use_tasks(shared, "beta"):
        assert torch.equal(logits(shared, BATCH), expect(shared, "beta"))


def test_precedence(model: PeftModel) -> None:
    pinned_default = {task: expect(model, task) for task in TASKS}
    with pytest.warns(UserWarning, match="default task 'gamma' of 3"):
        assert torch.equal(logits(model, BATCH), pinned_default["gamma"])
    model.set_task("alpha")
    assert torch.equal(logits(model, BATCH), pinned_default["alpha"])
    with use_tasks(model, MIXED):
        mixed = logits(model, BATCH)
        with use_tasks(model, "beta"):
            assert torch.equal(logits(model, BATCH), pinned_default["beta"])
            assert torch.equal(expect(model, "gamma"), pinned_default["gamma"])
        assert torch.equal(logits(model, BATCH), mixed)
    assert torch.equal(logits(model, BATCH), pinned_default["alpha"])
    model.set_task("beta")
    assert torch.equal(logits(model, BATCH), pinned_default["beta"])
    model.set_task(None)
    assert torch.equal(logits(model, BATCH), pinned_default["gamma"])


def test_one_warning_for_the_default_task() -> None:
    several, single = adapted_model("bert"), adapted_model("bert", tasks=["only"])
    batch = example_batch("bert")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            several(**batch)
            several.get_base_model()(**batch)
            single(**batch)
    assert [warning.category for warning in caught] == [UserWarning]
    assert "remove_unused_columns=False" in str(caught[0].message)


def test_training_several_tasks_without_naming_one_is_refused() -> None:
    batch = example_batch("bert")
    model, fixed = adapted_model("bert").train(), adapted_model("bert", default_task="beta").train()
    with pytest.raises(ValueError, match="trains 3 tasks, but this batch does not say which: all its rows would train"):
        model(**batch)
    with torch.no_grad(), pytest.warns(UserWarning, match="'alpha' of 3"):
        model(**batch)
    model.set_task("beta")
    model(**batch)
    model.set_task(None)
    with use_tasks(model, "beta"):
        model(**batch)
    with pytest.warns(UserWarning, match="'beta' of 3"):
        fixed(**batch)
    adapted_model("bert", tasks=["only"]).train()(**batch)


def test_task_embeddings_equal_the_learned_ones_and_receive_gradients(shared: PeftModel) -> None:
    weight = shared.base_model.router.network("default").task_embedding.weight
    embeddings = weight.detach()[IDS].requires_grad_()
    output = shared(**BATCH, task_embeddings=embeddings).logits
    assert_close(output, expect(shared, IDS), rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    output.square().sum().backward()
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(dim=1) > 0).all()
    shared.zero_grad()
    with use_tasks(shared, task_embeddings=weight.detach()[1:2]):
        one = row_of(BATCH, 0)
        assert torch.equal(logits(shared, one), logits(shared, one, tasks="beta"))


@pytest.mark.parametrize("tasks", [MIXED, ["gamma", "gamma", "alpha", "gamma"]], ids=["all", "repeated"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_batch_equals_its_rows(name: str, tasks: list[str]) -> None:
    model = adapted_model(name).double()
    batch = double(example_batch(name, labels=False))
    together = model(**batch, tasks=tasks).logits
    together.square().sum().backward()
    mixed = gradients(model)
    model.zero_grad()
    for row, task in enumerate(tasks):
        alone = model(**row_of(batch, row), tasks=[task]).logits
        assert_close(together[row : row + 1], alone, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
        alone.square().sum().backward()
    assert set(mixed) == set(adapter_parameters(model))
    scale = max(float(gradient.abs().max()) for gradient in mixed.values())
    for key, gradient in gradients(model).items():
        assert_close(mixed[key], gradient, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL * scale, msg=key)


@pytest.mark.parametrize("tasks", [[2, 0], [1, 1, 1, 2]], ids=["fewer rows than tasks", "more"])
def test_ids_on_a_device_give_the_same_unread(shared: PeftModel, monkeypatch: Any, tasks: list[int]) -> None:
    batch, ids = {name: values[: len(tasks)] for name, values in BATCH.items()}, torch.tensor(tasks)
    expected = logits(shared, batch, tasks=ids)
    for module in (ids_module, requests_module):
        monkeypatch.setattr(module, "can_read", lambda ids: False)
    assert_close(logits(shared, batch, tasks=ids), expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    for wrong in (-1, 3):
        ids[1] = wrong
        with pytest.raises(IndexError, match=r"out of (range|bounds)"):
            logits(shared, batch, tasks=ids)


def test_pinned_factors_are_generated_once(model: PeftModel) -> None:
    calls = network_calls(model.requires_grad_(False))
    model.set_task("beta")
    for _ in range(3):
        logits(model, BATCH)
    assert len(calls) == 1
    logits(model, BATCH, tasks="alpha")
    logits(model, BATCH)
    assert len(calls) == 2
    model(**BATCH)
    model(**BATCH)
    assert len(calls) == 4, "with gradients on, every pass needs a graph of its own"


def test_going_back_to_a_pinned_task_generates_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(kept_factors, "KEPT_TASKS", 2)
    model = adapted_model("llama")
    expected = {task: expect(model, task) for task in TASKS}
    calls = network_calls(model.requires_grad_(False))

    def generated(*tasks: str | None) -> int:
        before = len(calls)
        for task in tasks:
            model.set_task(task)
            if task is not None:
                assert torch.equal(logits(model, BATCH), expected[task])
        return len(calls) - before

    assert generated("alpha", "beta", "alpha", "beta") == 2
    # The third takes the place of the one that was not used for longest.
    assert generated("alpha", "gamma", "alpha", "gamma") == 1
    assert generated("beta") == 1
    # Pinned again, or unpinned, everything is generated anew.
    assert generated("beta", "gamma") == 2
    assert generated(None, "gamma") == 1
    model.rename_task("beta", "old")
    model.rename_task("alpha", "beta")
    expected["beta"] = expected["alpha"]
    assert generated("beta", "gamma") == 2


@pytest.mark.parametrize(
    "change", ["in_place", "optimizer", "load_state_dict", "to_float64", "data", "training", "averages"]
)
def test_pinned_factors_follow_the_parameters(model: PeftModel, change: str) -> None:
    # Factors are kept for what is not trained.
    model.requires_grad_(change in ("optimizer", "training", "averages"))
    model.set_task("beta")
    before = logits(model, BATCH)
    parameters = adapter_parameters(model)
    if change == "in_place":
        with torch.no_grad():
            next(iter(parameters.values())).mul_(-1)
    elif change == "optimizer":
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        logits(model, BATCH)
        # Fused optimisers count no versions either.
        torch.optim.AdamW(parameters.values(), lr=0.1, fused=True).step()
    elif change == "load_state_dict":
        model.load_state_dict({name: -value.detach() for name, value in parameters.items()}, strict=False)
    elif change == "to_float64":
        model.to(torch.float64)
    elif change == "data":
        for parameter in parameters.values():
            parameter.data = parameter.data * -2
    elif change == "averages":
        # Averages of the weights are swapped in for an evaluation, with no pass with gradients in between.
        for parameter in parameters.values():
            parameter.data.copy_(parameter.data * -2)
    else:
        # Writing through `.data`, as DeepSpeed does, counts no versions.
        model(**BATCH)
        for parameter in parameters.values():
            parameter.data.mul_(-2)
    after = logits(model, BATCH)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(copy.deepcopy(model), BATCH))
    # Gradients switched on, nothing comes from what was kept.
    assert torch.equal(after, model(**BATCH).logits)


@pytest.mark.parametrize("part", ["base", "encoder"])
def test_calls_below_the_peft_model_use_the_task_in_force(part: str) -> None:
    model = adapted_model("t5").double()
    batch = example_batch("t5", labels=False)

    def run(**routing: str) -> Any:
        if part == "base":
            return (model if routing else model.get_base_model())(**batch, **routing)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if not routing:
            return model.get_encoder()(**inputs)
        # A full call is the reference: only its encoder's output is used.
        output = model(**batch, **routing)
        return {"last_hidden_state": output.encoder_last_hidden_state}

    def result(output: Any) -> Tensor:
        return output["logits" if part == "base" else "last_hidden_state"]

    def check(task: str) -> None:
        for routing in ({"tasks": task}, {}):
            model.zero_grad()
            outputs.append(result(run(**routing)))
            outputs[-1].square().sum().backward()
            grads.append(gradients(model))
        assert_close(*outputs[-2:], rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
        assert_close(*grads[-2:], rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)

    outputs: list[Tensor] = []
    grads: list[dict[str, Tensor]] = []
    with pytest.warns(UserWarning, match="default task 'alpha'"):
        check("alpha")
    model.set_task("beta")
    check("beta")
    with use_tasks(model, "gamma"):
        check("gamma")
    assert (outputs[0] - outputs[2]).abs().max() > 0.1


def test_nothing_is_left_after_a_call_or_an_exception(model: PeftModel) -> None:
    router = model.base_model.router
    expected = expect(model, "beta")
    last = model.get_base_model().model.layers[-1]
    handle = last.register_forward_pre_hook(lambda *_: pytest.fail("stop"))
    for context in (contextlib.nullcontext(), use_tasks(model, MIXED)):
        with pytest.raises(pytest.fail.Exception, match="stop"), context:
            model(**BATCH, tasks=MIXED)
    handle.remove()
    with pytest.raises(ValueError, match="4 rows"):
        model(**row_of(BATCH, 0), tasks=MIXED)
    expect(model, MIXED)
    assert router.current is None
    assert router.asked is None
    model.set_task("beta")
    # Outside of a pass each position is generated alone, which rounds differently.
    close = {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}
    assert_close(logits(model.get_base_model(), BATCH), expected, **close)
    base = model.unload()
    assert not base._forward_pre_hooks


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(model: PeftModel, duplicate: Any, after_forward: bool) -> None:
    expected = {task: expect(model, task) for task in TASKS} if after_forward else {}
    model.set_task("alpha")
    if after_forward:
        logits(model, BATCH)
        model(**BATCH, tasks=MIXED).logits.sum().backward()
    twin = duplicate(model)
    twin.set_task("beta")
    for task in TASKS:
        assert torch.equal(expect(twin, task), expected.get(task, expect(model, task)))
    assert torch.equal(logits(model, BATCH), expect(model, "alpha"))
    assert torch.equal(logits(twin, BATCH), expect(model, "beta"))
    before = expect(model, MIXED)
    with torch.no_grad():
        for parameter in adapter_parameters(twin).values():
            parameter.zero_()
    assert torch.equal(expect(model, MIXED), before)
    assert not torch.equal(expect(twin, MIXED), before)


def test_disabled_adapter_accepts_tasks(shared: PeftModel) -> None:
    with shared.disable_adapter():
        assert torch.equal(expect(shared, MIXED), logits(base_model("llama"), BATCH))


@pytest.mark.parametrize(
    ("name", "task_type"),
    [
        ("bert", None),
        ("bert", "SEQ_CLS"),
        ("bert", "FEATURE_EXTRACTION"),
        ("gpt2", "CAUSAL_LM"),
        ("llama", None),
        ("t5", "SEQ_2_SEQ_LM"),
        ("t5", None),
        ("vit", None),
    ],
)
def test_every_peft_model_takes_tasks(name: str, task_type: str | None) -> None:
    exclude = ["classifier"] if name in ("bert", "vit") else None
    model = adapted_model(name, task_type=task_type, exclude_modules=exclude)
    plain = adapted_model(name, exclude_modules=exclude)
    batch = example_batch(name, labels=False)
    mixed = logits(model, batch, tasks=MIXED)
    assert torch.equal(mixed, logits(plain, batch, tasks=MIXED))
    assert not torch.equal(mixed, logits(model, batch, tasks="beta"))
    with pytest.raises(ValueError, match="tasks for 3 rows, but the batch has 4"):
        model(**batch, tasks=MIXED[:3])


class Flattening(nn.Module):
    """Runs its linear layer on (batch · length, dim), as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor, flatten: bool = True) -> Tensor:
        inner = x.reshape(-1, x.shape[-1]) if flatten else x
        return self.layers[0](inner).reshape(x.shape)


def test_modules_that_see_flattened_rows() -> None:
    model = make_active(get_peft_model(Flattening(), adapter_config(target_modules=["0"])))
    x = torch.randn(ROWS, 5, 6)
    flat, whole = model(x, tasks=MIXED), model(x, flatten=False, tasks=MIXED)
    assert_close(flat, whole, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    model.base_model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0][:10],))
    with pytest.raises(ValueError, match=r"shape \(10, 6\), in which the 4 rows .* cannot be told apart"):
        model(x, tasks=MIXED)
