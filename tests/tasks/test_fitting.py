"""A new task from labelled examples: only its embedding is fitted, and the model is left as it was."""

import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from hyperadapt.tasks.fitting import default_arguments
from tests.support.helpers import (
    TASKS,
    adapted_model,
    adapter_config,
    base_model,
    checkpointing_arguments,
    example_batch,
    letters,
    logits,
    make_active,
    snapshot,
    trainable,
)
from tests.support.tolerances import FLOAT32_FORWARD

BATCH = example_batch("bert", 12)


def examples_of(model: PeftModel, embedding: Tensor) -> Dataset:
    """Rows labelled by what the model says with an embedding, so that an embedding can fit them."""
    inputs = {name: value for name, value in BATCH.items() if name != "labels"}
    labels = logits(model, inputs, task_embeddings=embedding).argmax(-1)
    return Dataset.from_dict({name: value.tolist() for name, value in inputs.items()} | {"labels": labels.tolist()})


def loss_of(model: PeftModel, task: str, examples: Dataset) -> float:
    batch = {name: torch.tensor(list(examples[name])) for name in examples.column_names}
    with torch.no_grad():
        return float(model(**batch, tasks=task).loss)


def test_examples_find_the_task_and_nothing_else_changes(capsys: pytest.CaptureFixture[str]) -> None:
    # Other tests turn it off.
    logging.enable_progress_bar()
    model = adapted_model("bert", normalization="frobenius")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    inputs = {name: value for name, value in BATCH.items() if name != "labels"}
    before = [logits(model, inputs, tasks=task) for task in TASKS]
    # One module in training mode and one frozen parameter, to be found like that again.
    model.base_model.model.classifier.train()
    next(model.parameters()).requires_grad_(False)
    state, trained = snapshot(model.base_model.model), trainable(model)
    random_states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    model.add_task("new", examples=examples)
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == random_states
    printed = capsys.readouterr()
    assert "train_runtime" not in printed.out
    # Starting points and steps.
    assert re.search(r"fitting the new task: 100%.*\b(\d+)/\1 \[.*, loss \d\.\d+\]", printed.err)
    assert loss_of(model, "new", examples) < min(loss_of(model, task, examples) for task in TASKS)
    assert all(torch.equal(value, state[name]) for name, value in snapshot(model.base_model.model).items())
    assert trainable(model) == trained
    assert model.base_model.model.classifier.training
    assert not model.base_model.model.bert.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(logits(model, inputs, tasks=task), old) for task, old in zip(TASKS, before, strict=True))


def test_fitting_is_the_same_every_time() -> None:
    model = adapted_model("bert", normalization="frobenius")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    model.add_task("first", examples=examples)
    torch.manual_seed(123)
    model.add_task("second", examples=list(examples))
    weight = model.base_model.router.network("default").task_embedding.weight
    # The second starts at the first, which fits best.
    assert loss_of(model, "second", examples) <= loss_of(model, "first", examples)
    model.remove_task("first")
    model.remove_task("second")
    model.add_task("third", examples=examples)
    again = model.base_model.router.network("default").task_embedding.weight
    assert torch.equal(again[3], weight[3])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_is_around(mode: Callable[[], AbstractContextManager[None]]) -> None:
    model = adapted_model("bert", normalization="frobenius")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    model.add_task("first", examples=examples)
    with mode():
        model.remove_task("first")
        model.add_task("second", examples=examples)
        assert not torch.is_grad_enabled()
    weight = model.base_model.router.network("default").task_embedding.weight.detach().clone()
    model.remove_task("second")
    model.add_task("third", examples=examples)
    assert torch.equal(model.base_model.router.network("default").task_embedding.weight, weight)


def test_no_step_keeps_the_best_start(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_embedding": "text", "text_encoder": letters}
    model = adapted_model("bert", tasks={"alpha": "find it", "beta": "name it"}, normalization="frobenius", **settings)
    description = "zyx wvu tsr"
    examples = examples_of(model, model.embed_description(description, text_encoder=letters))
    arguments = default_arguments(str(tmp_path), len(examples), torch.device("cpu"))
    arguments.max_steps, arguments.learning_rate = 1, 0.0
    model.add_task(
        "new", examples=examples, description=description, text_encoder=letters, training_arguments=arguments
    )
    config = model.peft_config["default"]
    assert config.task_embedding == {"alpha": "text", "beta": "text", "new": "learned"}
    assert config.task_descriptions["new"] == description
    model.add_task("described", description=description, text_encoder=letters)
    model.interpolate_tasks("mean", {"alpha": 0.5, "beta": 0.5})
    losses = [loss_of(model, task, examples) for task in ("alpha", "beta", "mean", "described")]
    assert loss_of(model, "new", examples) == pytest.approx(min(losses), rel=FLOAT32_FORWARD)
    assert len(set(losses)) == 4


def test_collator_and_several_batches(tmp_path: Path) -> None:
    model = adapted_model("llama")
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (3, 4, 5) for _ in range(12)]

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
            for name, value in fill.items()
        }

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    before = dict(vars(arguments))
    model.add_task("new", examples=rows, data_collator=pad, training_arguments=arguments)
    assert vars(arguments) == before
    assert model(**pad(rows[:2]), tasks="new").loss.isfinite()


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "examples has no rows. Give some labelled examples"),
        ("texts", TypeError, "examples is of type str, but must be a datasets.Dataset or a list of rows"),
        ({"input_ids": [[1]]}, TypeError, "examples is of type dict, but must be a datasets.Dataset or a list of rows"),
        ([3], TypeError, "Row 0 of examples is 3, but must be a dict of model inputs with labels"),
        ([{"input_ids": [1, 2]}], ValueError, "The model gave no loss for columns ['input_ids']. Every example needs"),
    ],
)
def test_bad_examples_are_refused(examples: Any, error: type[Exception], message: str) -> None:
    model = adapted_model("bert")
    trained = trainable(model)
    with pytest.raises(error, match=re.escape(message)):
        model.add_task("new", examples=examples)
    assert model.peft_config["default"].tasks == TASKS
    assert trainable(model) == trained


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = adapted_model("bert")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    with torch.no_grad():
        model.base_model.model.classifier.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="The loss of the examples is nan from every starting point"):
        model.add_task("new", examples=examples)


def test_merged_tasks_are_in_the_way() -> None:
    model = adapted_model("bert")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    model.set_task("alpha")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Task 'alpha' of adapter 'default' is merged into the base weights"):
        model.add_task("new", examples=examples)


def test_many_tasks_give_few_starts() -> None:
    config = adapter_config(tasks=[str(index) for index in range(150)], target_modules="all-linear")
    model = make_active(get_peft_model(base_model("bert"), config))
    assert len(model._table().starts(None, None)) == 51


def test_arguments_of_a_training_leave_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    model = adapted_model("bert")
    examples = examples_of(model, torch.linspace(-1, 1, 8))
    options: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": "none", "dataloader_pin_memory": False}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    options |= checkpointing_arguments()
    model.add_task("new", examples=examples, training_arguments=TrainingArguments(str(tmp_path), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    smoothed = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **options)
    with pytest.raises(
        ValueError, match=r"has label_smoothing_factor=0\.1, which needs a whole model, but only a task"
    ):
        model.add_task("newer", examples=examples, training_arguments=smoothed)


def test_the_steps_of_a_fit_are_no_steps_of_the_warm_up() -> None:
    model = adapted_model("bert", normalization_warmup=50)
    warmup = model.base_model.router.network("default").warmup
    before = int(warmup.trained_steps)
    model.train()
    model(**example_batch("bert"), tasks="alpha")
    model.add_task("new", examples=examples_of(model, torch.linspace(-1, 1, 8)))
    assert int(warmup.trained_steps) == before
    # The step that was expected still counts.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
    assert int(warmup.trained_steps) == before + 1
