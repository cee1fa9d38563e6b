"""Gradient checkpointing: recomputed blocks use the factors of their own forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from hyperadapt.tuner.layer import layers_in
from tests.support.helpers import (
    MIXED,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    checkpointing_arguments,
    enable_checkpointing,
    example_batch,
    gradients,
    make_active,
)
from tests.support.tolerances import FLOAT64_MODEL

NAMES = ("bert", "gpt2", "llama", "t5")
MODES = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def loss_and_gradients(model: nn.Module, name: str, *requests: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One backward over the sum of a forward pass per request."""
    model.train().zero_grad()
    loss = sum(
        (1 + index) * model(**example_batch(name, seed=index), tasks=tasks).loss for index, tasks in enumerate(requests)
    )
    loss.backward()
    return loss.detach(), gradients(model)


def count_layer_calls(model: PeftModel) -> list[int]:
    """Grows when an adapted layer runs, so that recomputation is seen to happen."""
    calls: list[int] = []
    for layer in layers_in(model):
        # Not while where rows lie is learned.
        layer.register_forward_hook(lambda layer, *_: calls.append(1) if layer.router.current.prints is None else None)
    return calls


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = True) -> None:
    assert set(actual) == set(expected)
    for key, gradient in expected.items():
        if exact:
            assert torch.equal(actual[key], gradient), key
        else:
            assert_close(actual[key], gradient, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL, msg=key)


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_same_loss_and_gradients(name: str, use_reentrant: bool) -> None:
    model = adapted_model(name).double()
    # Passes with different tasks before one backward.
    requests = (MIXED, MIXED[::-1], "beta")
    calls = count_layer_calls(model)
    loss, expected = loss_and_gradients(model, name, *requests)
    plain_calls = len(calls)
    enable_checkpointing(model, use_reentrant)
    checkpointed_loss, actual = loss_and_gradients(model, name, *requests)
    assert len(calls) - plain_calls > 1.5 * plain_calls, "nothing was recomputed"
    assert set(actual) == set(adapter_parameters(model))
    # T5 goes without its cache when checkpointed, and its encoder output feeds every decoder block, whose gradients
    # are then summed in another order.
    assert_equal({"loss": checkpointed_loss, **actual}, {"loss": loss, **expected}, exact=name != "t5")


@MODES
def test_dropout_is_replayed(use_reentrant: bool) -> None:
    model = adapted_model("llama", lora_dropout=0.5)
    torch.manual_seed(5)
    loss, expected = loss_and_gradients(model, "llama", MIXED)
    assert not torch.equal(loss, loss_and_gradients(model, "llama", MIXED)[0])
    enable_checkpointing(model, use_reentrant)
    torch.manual_seed(5)
    checkpointed_loss, actual = loss_and_gradients(model, "llama", MIXED)
    assert torch.equal(checkpointed_loss, loss)
    assert_equal(actual, expected)


@MODES
def test_enabled_before_the_adapter_is_made(use_reentrant: bool) -> None:
    expected = loss_and_gradients(adapted_model("bert"), "bert", MIXED)[1]
    base = base_model("bert")
    enable_checkpointing(base, use_reentrant)
    torch.manual_seed(1)
    model = make_active(get_peft_model(base, adapter_config(target_modules="all-linear")))
    assert_equal(loss_and_gradients(model, "bert", MIXED)[1], expected)


@MODES
def test_several_adapters(use_reentrant: bool) -> None:
    model = adapted_model("llama")
    model.add_adapter("second", adapter_config(target_modules=["q_proj", "down_proj"]))
    make_active(model)
    model.base_model.set_adapter(["default", "second"])
    _, expected = loss_and_gradients(model, "llama", MIXED)
    assert {key.split(".")[2] for key in expected} == {"default", "second"}
    enable_checkpointing(model, use_reentrant)
    assert_equal(loss_and_gradients(model, "llama", MIXED)[1], expected)


@MODES
def test_nothing_stays_wrapped(use_reentrant: bool) -> None:
    model = adapted_model("llama")
    enable_checkpointing(model, use_reentrant)
    blocks = [block for block in model.modules() if "_gradient_checkpointing_func" in vars(block)]
    functions = [vars(block)["_gradient_checkpointing_func"] for block in blocks]
    assert len(blocks) >= 2
    batch = example_batch("llama")
    model.train()
    model(**batch, tasks=MIXED)
    handle = blocks[-1].register_forward_pre_hook(lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        model(**batch, tasks=MIXED)
    handle.remove()
    assert [vars(block)["_gradient_checkpointing_func"] for block in blocks] == functions
    assert model.base_model.router.current is None


def test_base_model_called_by_itself_is_refused() -> None:
    model = adapted_model("llama", tasks=["only"]).train()
    enable_checkpointing(model, use_reentrant=False)
    loss = model.get_base_model()(**example_batch("llama")).loss
    with pytest.raises(RuntimeError, match="call the PeftModel itself"):
        loss.backward()


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in adapter_parameters(model).values()])


def trained_weights(folder: Path, checkpointed: bool) -> tuple[Tensor, int]:
    model = adapted_model("llama")
    batch = example_batch("llama", rows=8)
    rows = [{key: value[row] for key, value in batch.items()} | {"tasks": row % 3} for row in range(8)]
    calls = count_layer_calls(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        **(checkpointing_arguments() if checkpointed else {}),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    return flat_weights(model), len(calls)


def test_trainer(tmp_path: Path) -> None:
    weights, calls = trained_weights(tmp_path, checkpointed=False)
    checkpointed_weights, checkpointed_calls = trained_weights(tmp_path, checkpointed=True)
    assert checkpointed_calls > 1.5 * calls
    assert torch.equal(checkpointed_weights, weights)
    assert not torch.equal(weights, flat_weights(adapted_model("llama")))


# While where rows lie is learned, these models checkpoint all the same.
WITHOUT_GRADIENTS = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Stack(nn.Module):
    """Blocks checkpointed by hand, or through a function that their parent holds, as in older models."""

    def __init__(self, use_reentrant: bool, by_hand: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.gradient_checkpointing = not by_hand
        self.use_reentrant = use_reentrant
        self._gradient_checkpointing_func = self.checkpoint

    def checkpoint(self, run: Any, *args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=self.use_reentrant)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        function = self._gradient_checkpointing_func if self.gradient_checkpointing else self.checkpoint
        for block in self.blocks:
            x = block(x) if plain else function(block.__call__, x)
        return x


def stack(use_reentrant: bool, by_hand: bool) -> PeftModel:
    torch.manual_seed(0)
    config = adapter_config(target_modules=r"blocks\.\d\.0")
    return make_active(get_peft_model(Stack(use_reentrant, by_hand), config)).train()


@WITHOUT_GRADIENTS
@MODES
def test_foreign_checkpoint_is_refused(use_reentrant: bool) -> None:
    model = stack(use_reentrant, by_hand=True)
    x = torch.randn(4, 6, requires_grad=True)
    output = model(x, tasks=MIXED)
    assert torch.equal(output, model(x, plain=True, tasks=MIXED))
    message = "'blocks.1.0' is recomputed during backward by a checkpoint that hyperadapt does not know"
    with pytest.raises(RuntimeError, match=message):
        output.sum().backward()
    assert gradients(model) == {}


@WITHOUT_GRADIENTS
@MODES
def test_checkpoint_function_of_a_stack(use_reentrant: bool) -> None:
    model = stack(use_reentrant, by_hand=False)
    x = torch.randn(4, 6)
    results = []
    for plain in (True, False):
        model.zero_grad()
        output = model(x, plain=plain, tasks=MIXED)
        output.square().sum().backward()
        results.append({"output": output.detach(), **gradients(model)})
    assert len(results[0]) > 1
    assert_equal(results[1], results[0])
