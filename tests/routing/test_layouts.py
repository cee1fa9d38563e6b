"""Where rows lie is learned once, leaves no trace, and is learned anew where it may differ."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from hyperadapt import use_tasks
from tests.support.families import FAMILIES
from tests.support.helpers import (
    MIXED,
    ROWS,
    TASKS,
    adapted_model,
    adapter_config,
    example_batch,
    logits,
    make_active,
    row_of,
)
from tests.support.odd_models import Windows


def layouts(model: PeftModel) -> dict[str, Any]:
    """Of the last kind of call that was learned."""
    return next(iter(list(model.base_model.router.layouts._learned.values())[-1].values()))


def count_base_calls(model: PeftModel) -> list[int]:
    calls: list[int] = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_learned_once_for_batches_of_other_sizes() -> None:
    model = adapted_model("bert")
    calls = count_base_calls(model)
    logits(model, example_batch("bert", labels=False), tasks="beta")
    assert len(calls) == 1
    logits(model, example_batch("bert", labels=False), tasks=MIXED)
    learned = len(calls)
    assert learned > 2
    for rows in (2, 8):
        logits(model, example_batch("bert", rows, labels=False), tasks=[TASKS[row % 3] for row in range(rows)])
    assert len(calls) == learned + 2
    # Another output is another kind of call.
    batch = example_batch("bert", labels=False)
    logits(model, batch, tasks=MIXED, output_attentions=True)
    assert len(calls) > learned + 4


def test_one_row_or_one_task_learns_nothing() -> None:
    model = adapted_model("llama")
    batch = example_batch("llama", labels=False)
    for inputs, tasks in ((row_of(batch, 0), ["beta"]), (batch, ["beta"] * ROWS), (batch, "beta")):
        logits(model, inputs, tasks=tasks)
    assert model.base_model.router.layouts._learned == {}


def test_windows_of_other_sizes_are_learned_anew() -> None:
    model = make_active(get_peft_model(Windows(), adapter_config(target_modules="all-linear")))
    calls = count_base_calls(model)
    for length in (6, 6, 9, 6):
        x = torch.randint(3, 40, (3, length))
        together = model(x, tasks=TASKS)
        for row, task in enumerate(TASKS):
            assert torch.allclose(together[row], model(x[row : row + 1], tasks=task)[0], atol=1e-5)
        calls.append(0)
    runs = "".join(map(str, calls)).split("0")[:-1]
    assert [len(run) for run in runs] == [len(runs[0]), 4, len(runs[0]), 4]
    assert len(runs[0]) > 4


def test_no_trace_is_left() -> None:
    model = adapted_model("llama", lora_dropout=0.5)
    model.train()
    frozen = model.get_base_model().model.layers[0].eval()
    batch = example_batch("llama")
    torch.manual_seed(3)
    first = model(**batch, tasks=MIXED).loss
    torch.manual_seed(3)
    second = model(**batch, tasks=MIXED).loss
    assert torch.equal(first, second)
    assert first.requires_grad
    assert not frozen.training
    assert all(module.training for module in model.get_base_model().model.layers[1].modules())


def test_a_cache_is_not_touched() -> None:
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    cache = DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True, tasks=MIXED)
    assert cache.get_seq_length() == batch["input_ids"].shape[1]
    assert cache.layers[0].keys.shape[0] == ROWS


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_them(duplicate: Any) -> None:
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    expected = logits(model, batch, tasks=MIXED)
    copied = duplicate(model)
    calls = count_base_calls(copied)
    assert torch.equal(logits(copied, batch, tasks=MIXED), expected)
    assert len(calls) == 1


class Moody(nn.Module):
    """A switch says whether its layer sees tokens, rows, or only the tokens of long rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, mode: str = "whole") -> Tensor:
        if mode == "broken" and len(x) < 3:
            raise RuntimeError("at least three rows, please")
        kept = {"flat": x.flatten(0, 1), "first": x[:, 0], "some": x[x[..., 0] > 0]}.get(mode, x)
        return self.fc(kept)


@pytest.fixture
def moody() -> PeftModel:
    return make_active(get_peft_model(Moody(), adapter_config(target_modules=["fc"])))


def test_switches_are_learned_apart(moody: PeftModel) -> None:
    x = torch.randn(ROWS, 5, 6)
    whole = moody(x, tasks=MIXED)
    assert torch.allclose(moody(x, mode="flat", tasks=MIXED), whole.flatten(0, 1), atol=1e-6)
    assert torch.allclose(moody(x, mode="first", tasks=MIXED), whole[:, 0], atol=1e-6)
    # Another length is no other kind of call.
    assert moody(x[:, :3], mode="flat", tasks=MIXED).shape == (3 * ROWS, 6)
    assert len(moody.base_model.router.layouts._learned) == 3


def test_why_rows_cannot_be_told_apart(moody: PeftModel) -> None:
    # Each row has as many positive tokens as any other, but others would have others.
    x = torch.randn(ROWS, 5, 6)
    x[..., 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match=r"Module 'fc'.*shape \(12, 6\).*4 rows.*depends on what the rows say"):
        moody(x, mode="some", tasks=MIXED)
    with pytest.raises(ValueError, match=r"does not run on single rows \(at least three rows, please\)"):
        moody(x, mode="broken", tasks=MIXED)
    # That is tried again: another batch may do.
    assert len(moody.base_model.router.layouts._learned) == 1


def test_a_layer_called_by_itself_is_refused(moody: PeftModel) -> None:
    with (
        use_tasks(moody, MIXED),
        pytest.raises(ValueError, match=r"Module 'fc'.*cannot be told apart: it is called by itself"),
    ):
        moody.get_base_model().fc(torch.randn(ROWS, 6))


def test_parts_called_by_themselves() -> None:
    """Their rows are those of their main input, if it is that of the whole model."""
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    with torch.no_grad(), use_tasks(model, MIXED):
        backbone = model.get_base_model().model
        together = backbone(**batch).last_hidden_state
        for row, task in enumerate(MIXED):
            with use_tasks(model, task):
                assert torch.allclose(backbone(**row_of(batch, row)).last_hidden_state[0], together[row], atol=1e-4)
    family = FAMILIES["llava"]
    model, batch = (
        make_active(get_peft_model(family.build(), adapter_config(target_modules="all-linear"))).double(),
        family.batch(2, 3),
    )
    images = batch["pixel_values"][:2]
    with (
        use_tasks(model, TASKS[:2]),
        pytest.raises(ValueError, match="by itself, and its rows need not be those of input_ids"),
    ):
        model.get_base_model().model.vision_tower(images)


def test_sequences_that_generate_makes_are_checked() -> None:
    model, batch = adapted_model("llama", task_type="CAUSAL_LM"), example_batch("llama", labels=False)

    def doubled(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {
            name: value.repeat(2, 1) if isinstance(value, Tensor) else value for name, value in kwargs.items()
        }

    model.get_base_model().register_forward_pre_hook(doubled, with_kwargs=True, prepend=True)
    with pytest.raises(ValueError, match="called with 8 rows, which is not what generate makes of them"):
        model.generate(**batch, tasks=MIXED, max_new_tokens=2)


@pytest.mark.parametrize("name", ["tasks", "task_embeddings", "task_rows"])
def test_the_base_model_is_not_given_what_it_would_ignore(name: str) -> None:
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    with pytest.raises(TypeError, match=f"{name}= was given to LlamaForCausalLM, which would ignore it.*use_tasks"):
        model.get_base_model()(**batch, **{name: "beta"})
