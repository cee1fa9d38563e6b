"""A task that is trained alone, by factors of its own: others keep every bit, and it goes wherever a task goes."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hyperadapt import LoraGenerator, export_lora
from tests.support.example_rows import MIXED_SOURCES, batch_of, example_model, rows_of
from tests.support.helpers import (
    TASKS,
    adapted_model,
    base_model,
    example_batch,
    gradients,
    logits,
    row_of,
    snapshot,
    trainable,
)
from tests.support.tolerances import EXPORT_FLOAT32, FLOAT32_FORWARD

CLOSE = {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}
EXPORTED = {"rtol": EXPORT_FLOAT32, "atol": EXPORT_FLOAT32}
INPUTS = example_batch("llama", labels=False)
MIX = ["new", "beta", "alpha", "new"]


def with_task(**changes: Any) -> PeftModel:
    """A model with a new task that has factors of its own, which are zero."""
    model = adapted_model("llama", **changes)
    embedding = torch.randn(8, generator=torch.Generator().manual_seed(5))
    model.add_task("new", embedding=embedding)
    model.add_own_factors("new")
    return model


def train_alone(model: PeftModel, task: str = "new", steps: int = 3) -> None:
    model.set_trained_task(task)
    parameters = [one for one in model.parameters() if one.requires_grad]
    # Decay would reach what is trained and has no gradient.
    optimizer = torch.optim.AdamW(parameters, 0.02, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(**example_batch("llama"), tasks=task).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    model = with_task()
    train_alone(model)
    return model


def outputs(model: PeftModel) -> dict[str, Tensor]:
    found = {task: logits(model, INPUTS, tasks=task) for task in TASKS}
    return found | {"mixed": logits(model, INPUTS, tasks=[*TASKS, "alpha"])}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(one, second[name]) for name, one in first.items())


def test_a_task_trains_alone_and_others_keep_every_bit() -> None:
    model = adapted_model("llama", modules_to_save=["lm_head"])
    model.add_task("new", embedding=torch.ones(8))
    before, start = outputs(model), logits(model, INPUTS, tasks="new")
    model.add_own_factors("new")
    assert torch.equal(logits(model, INPUTS, tasks="new"), start)
    everything, weights = trainable(model), snapshot(model)
    train_alone(model)
    assert trainable(model) == {name for name in everything if ".own_factors.0." in name} != set()
    assert {name for name, value in snapshot(model).items() if not torch.equal(value, weights[name])} == trainable(
        model
    )
    assert same(outputs(model), before)
    first = logits(model, INPUTS, tasks="new")
    assert not torch.allclose(first, start, atol=0.1)
    # A second such task leaves the first as it is, too.
    model.add_task("newer", embedding=-torch.ones(8))
    model.add_own_factors("newer")
    train_alone(model, "newer")
    assert same(outputs(model), before)
    assert torch.equal(logits(model, INPUTS, tasks="new"), first)
    model.set_trained_task(None)
    assert trainable(model) == everything | {name.replace(".own_factors.0.", ".own_factors.1.") for name in everything}


def test_a_task_trains_alone_whatever_peft_switches() -> None:
    model = adapted_model("llama", modules_to_save=["lm_head"])
    model.add_own_factors("beta")
    everything = trainable(model)
    model.set_trained_task("beta")
    alone = trainable(model)
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == alone
    # As TRL does for its reference.
    model.set_adapter("default")
    assert trainable(model) == alone
    assert trainable(copy.deepcopy(model)) == alone
    model.rename_task("beta", "second")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == alone
    assert model.trained_task == "second"
    model.set_trained_task(None)
    assert model.trained_task is None
    with model.disable_adapter():
        pass
    assert trainable(model) == everything


def test_mixed_batches_equal_their_rows(trained: PeftModel) -> None:
    mixed = logits(trained, INPUTS, tasks=MIX)
    for row, task in enumerate(MIX):
        assert torch.allclose(mixed[row : row + 1], logits(trained, row_of(INPUTS, row), tasks=task), **CLOSE)
    ids = torch.tensor([trained.tasks.index(task) for task in MIX])
    assert torch.equal(logits(trained, INPUTS, tasks=ids), mixed)
    trained.set_task("new")
    assert torch.allclose(logits(trained, INPUTS), logits(trained, INPUTS, tasks="new"), **CLOSE)
    trained.set_task(None)


def test_a_mixed_batch_gives_the_gradients_of_its_rows(trained: PeftModel) -> None:
    trained.set_trained_task("new")
    found = []
    for count, tasks in ((2, ["new", "beta"]), (1, ["new"])):
        trained.zero_grad()
        batch = {name: value[:count] for name, value in INPUTS.items()}
        trained(**batch, tasks=tasks).logits[0].square().sum().backward()
        found.append(gradients(trained))
    trained.zero_grad()
    assert found[0].keys() == trainable(trained)
    for name, gradient in found[0].items():
        assert gradient.any()
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_saved_and_loaded(trained: PeftModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert loaded.peft_config["default"].own_factors == ["new"]
    assert torch.equal(logits(loaded, INPUTS, tasks=MIX), logits(trained, INPUTS, tasks=MIX))
    fields = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8")) | {
        "own_factors": ["beta", "new"]
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=r"own_factors\.1\.A_32x32_r4' is missing"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"own_factors\.1\.A_32x32_r4' is missing"):
        LoraGenerator.from_pretrained(tmp_path)


def test_exports_and_merges_equal_the_task(trained: PeftModel, tmp_path: Path) -> None:
    expected = logits(trained, INPUTS, tasks="new")
    export_lora(trained, "new", tmp_path / "lora")
    lora = PeftModel.from_pretrained(base_model("llama"), tmp_path / "lora")
    assert torch.allclose(logits(lora, INPUTS), expected, **EXPORTED)
    trained.save_pretrained(tmp_path / "adapter")
    made = LoraGenerator.from_pretrained(tmp_path / "adapter").state_dict("new")
    live = LoraGenerator.from_model(trained).state_dict("new")
    assert made.keys() == live.keys()
    assert all(torch.equal(value, live[name]) for name, value in made.items())
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter")
    loaded.set_task("new")
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged, INPUTS), expected, **EXPORTED)


def test_own_factors_follow_their_task() -> None:
    model = with_task()
    train_alone(model)
    expected, others = logits(model, INPUTS, tasks="new"), outputs(model)
    model.rename_task("new", "renamed")
    assert torch.equal(logits(model, INPUTS, tasks="renamed"), expected)
    model.remove_task("gamma")
    assert model.peft_config["default"].own_factors == ["renamed"]
    assert torch.equal(logits(model, INPUTS, tasks="renamed"), expected)
    assert torch.equal(logits(model, INPUTS, tasks="beta"), others["beta"])
    model.remove_task("renamed")
    assert model.peft_config["default"].own_factors is None
    assert not any("own_factors" in name for name in model.state_dict())
    assert torch.equal(logits(model, INPUTS, tasks="beta"), others["beta"])


def test_what_is_wrong_is_refused() -> None:
    model = with_task()
    message = "Task 'new' has factors of its own already. Train them (set_trained_task('new')), or remove the task"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.add_own_factors("new")
    message = (
        "Task 'alpha' has no factors of its own that could train alone. Give it some with add_own_factors('alpha')."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.set_trained_task("alpha")
    for method in (model.add_own_factors, model.set_trained_task):
        with pytest.raises(ValueError, match=r"Unknown task 'gama'\. Known tasks: "):
            method("gama")
    message = (
        "weights names 'new', which has factors of its own, and those do not follow from an embedding. Leave it out."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.interpolate_tasks("between", {"alpha": 1.0, "new": 1.0})


def test_tasks_that_were_changed_in_inference_mode_train() -> None:
    model = example_model("llama", MIXED_SOURCES | {"alpha": "both"})
    with torch.inference_mode():
        model.set_examples({name: rows_of("llama", 8, seed) for seed, name in enumerate(TASKS[1:])})
        model.add_task("new", examples=rows_of("llama", 6, 9))
        model.interpolate_tasks("between", {"beta": 1, "new": 1})
        model.add_own_factors("gamma")
        model.set_examples({"beta": rows_of("llama", 8, 3)})
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = snapshot(model)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model.train()(**batch_of("llama", 5), tasks=["alpha", "beta", "gamma", "new", "between"]).loss.backward()
    optimizer.step()
    assert [name for name in trained if torch.equal(before[name], trained[name])] == []
    model.load_state_dict(before)
