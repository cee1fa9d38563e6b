"""Fitting a hypernetwork to LoRAs: its loss against dense updates, recovery, and what is left alone."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from hyperadapt import export_lora
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.loras import distillation
from hyperadapt.loras.distillation import distill
from hyperadapt.loras.reading import read_lora
from tests.support.helpers import (
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    base_model,
    snapshot,
    two_adapters,
)
from tests.support.lora_library import lora_folder
from tests.support.tolerances import FLOAT32_FORWARD, FLOAT64_EXACT

EXACT = {"rtol": FLOAT64_EXACT, "atol": FLOAT64_EXACT}


def library(folder: Path, **changes: Any) -> dict[str, Path]:
    """LoRAs of different ranks, scalings and modules."""
    configs: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 3},
        {"r": 5, "use_rslora": True},
        {"r": 1, "target_modules": ["q_proj", "down_proj"]},
    ]
    return {
        task: lora_folder(folder / task, seed=seed, **config | changes)
        for seed, (task, config) in enumerate(zip(TASKS, configs, strict=True))
    }


def dense_squared_errors(model: PeftModel, folders: Mapping[str, Path]) -> Tensor:
    """Squared relative errors from dense updates, a task each; differentiable."""
    network = model.base_model.router.network("default")
    positions = {position.name: position for position in network.positions}
    generated = {name: factors.delta_weight() for name, factors in network(torch.arange(len(folders))).items()}
    errors = []
    for task, folder in enumerate(folders.values()):
        updates = read_lora("", folder, positions).updates
        doubled = {name: Factors(*(tensor.double() for tensor in factors)) for name, factors in updates.items()}
        wanted = {name: factors.delta_weight() for name, factors in doubled.items()}
        differences = [dense[task] - wanted.get(name, 0) for name, dense in generated.items()]
        total = sum(dense.square().sum() for dense in wanted.values())
        errors.append(torch.stack([difference.square().sum() for difference in differences]).sum() / total)
    return torch.stack(errors)


@pytest.mark.parametrize("options", [{}, {"head": "row", "normalization": "none", "rank_pattern": {"q_proj": 2}}])
def test_loss_and_gradients_are_those_of_dense_updates(tmp_path: Path, options: dict[str, Any]) -> None:
    folders = library(tmp_path)
    model = adapted_model("llama", **options).double()
    parameters = list(adapter_parameters(model).values())
    network = model.base_model.router.network("default")
    positions = {position.name: position for position in network.positions}
    loras = [read_lora(task, folder, positions) for task, folder in folders.items()]
    groups = distillation._grouped(network.positions, loras)
    rows = torch.tensor([2, 0])
    problem = distillation._Problem(network, torch.arange(3), groups, distillation._squared_norms(groups))
    ours = distillation._squared_errors(problem, rows, torch.float64)
    dense = dense_squared_errors(model, folders)[rows]
    assert_close(ours, dense, **EXACT)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = torch.autograd.grad((weights * dense).sum(), parameters)
    assert_close(torch.autograd.grad((weights * ours).sum(), parameters), expected, **EXACT)


def test_errors_reported_are_those_of_the_fitted_model(tmp_path: Path) -> None:
    folders = library(tmp_path)
    model = adapted_model("llama")
    result = distill(model, folders, steps=3)
    expected = dense_squared_errors(model, folders).sqrt()
    assert list(result.error) == TASKS
    # The network works in float32 on both sides.
    errors = torch.tensor(list(result.error.values()), dtype=torch.float64)
    assert_close(errors, expected.detach(), rtol=FLOAT32_FORWARD, atol=0.0)
    assert len(result.losses) == 3


def test_an_exact_fit_has_no_error(tmp_path: Path) -> None:
    model = adapted_model("llama")
    for task in TASKS:
        export_lora(model, task, tmp_path / task)
    # The learning rate is too small to change a weight.
    result = distill(model, {task: tmp_path / task for task in TASKS}, steps=1, learning_rate=1e-30)
    # A squared error is a difference of numbers of size 1 that were rounded to float32.
    assert max(result.error.values()) < FLOAT32_FORWARD**0.5


@pytest.mark.parametrize("normalization", ["soft_frobenius", "spectral"])
def test_representable_loras_are_recovered(tmp_path: Path, normalization: str) -> None:
    source = adapted_model("llama", normalization="soft_frobenius", normalization_bound=0.2)
    folders = {task: tmp_path / task for task in TASKS}
    for task, folder in folders.items():
        export_lora(source, task, folder)
    # Room for norms of 0.2 whatever the singular values: a unit of the spectral norm has a Frobenius norm of 1 to √r.
    changes = {"normalization": normalization, "normalization_bound": 0.5}
    model = adapted_model("llama", active=False, seed=5, hypernetwork_dim=64, **changes)
    result = distill(model, folders, steps=300, learning_rate=0.05)
    assert result.losses[0] == pytest.approx(1.0)
    assert max(result.error.values()) < 0.1


def test_result_is_the_same_with_the_same_seed(tmp_path: Path) -> None:
    folders = library(tmp_path)
    outcomes = []
    for seed in (0, 0, 1):
        result = distill(adapted_model("llama"), folders, steps=8, tasks_per_step=1, seed=seed)
        outcomes.append((result.losses, result.error))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2]


def test_shapes_that_no_lora_adapts_are_fitted_to_zero(tmp_path: Path) -> None:
    folders = library(tmp_path, target_modules=["q_proj"])
    model = adapted_model("llama")
    result = distill(model, folders, steps=3)
    expected = dense_squared_errors(model, folders).sqrt().tolist()
    assert list(result.error.values()) == pytest.approx(expected, rel=FLOAT32_FORWARD)


def test_modes_around_the_call_do_not_matter(tmp_path: Path) -> None:
    folders = library(tmp_path)
    expected = distill(adapted_model("llama"), folders, steps=2)
    model = adapted_model("llama")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        result = distill(model, folders, steps=2)
    assert (result.losses, result.error) == (expected.losses, expected.error)
    with torch.inference_mode():
        model = adapted_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Adapter 'default' was made inside of torch\.inference_mode, where nothing"):
        distill(model, folders)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tasks_without_a_lora_are_allowed(tmp_path: Path) -> None:
    folders = library(tmp_path)
    del folders["beta"]
    model = adapted_model("llama")
    before = model.base_model.router.network("default").task_embedding.weight.detach().clone()
    result = distill(model, folders, steps=2)
    changed = (model.base_model.router.network("default").task_embedding.weight != before).any(1)
    assert changed.tolist() == [True, False, True]
    assert list(result.error) == ["alpha", "gamma"]


@pytest.mark.parametrize("training", [False, True])
def test_everything_else_stays_as_it_was(tmp_path: Path, training: bool) -> None:
    folders = library(tmp_path)
    model = adapted_model("llama").train(training)
    model.set_task("beta")
    own = adapter_parameters(model)
    frozen, accumulated = list(own.values())[:2]
    frozen.requires_grad_(False)
    accumulated.grad = torch.ones_like(accumulated)
    before = snapshot(model)
    settings = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        distill(model, folders, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()] == settings
    assert torch.equal(accumulated.grad, torch.ones_like(accumulated))
    assert all(module.training == training for module in model.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == own.keys()


def test_pinned_tasks_see_the_new_weights(tmp_path: Path) -> None:
    model = adapted_model("llama", active=False)
    model.set_task("alpha")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        before = model(ids).logits
        distill(model, library(tmp_path), steps=3)
        assert not torch.equal(model(ids).logits, before)


def test_a_fit_that_diverges_changes_nothing(tmp_path: Path) -> None:
    folders = library(tmp_path)
    model = adapted_model("llama", normalization="none")
    before = snapshot(model)
    message = r"The fit diverged in step \d of 20 with learning_rate=1e\+20: the loss is (nan|inf)"
    with pytest.raises(ValueError, match=message):
        distill(model, folders, steps=20, learning_rate=1e20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    folders = library(tmp_path)
    model = adapted_model("llama", task_type="CAUSAL_LM")
    result = distill(model, folders, steps=1)
    model.save_pretrained(tmp_path / "fitted")
    files = [load_file(folder / "adapter_model.safetensors").values() for folder in folders.values()]
    [saved] = [load_file(tmp_path / "fitted" / "adapter_model.safetensors").values()]
    assert result.adapter_parameters == sum(value.numel() for value in saved)
    assert result.adapter_bytes == sum(value.nbytes for value in saved)
    assert result.lora_parameters == sum(value.numel() for file in files for value in file)
    assert result.lora_bytes == sum(value.nbytes for file in files for value in file)
    lines = str(result).splitlines()
    assert lines[0] == "3 LoRAs fitted in 1 steps"
    assert [line.split() for line in lines[2:5]] == [[task, f"{error:.3f}"] for task, error in result.error.items()]
    assert lines[5].startswith(f"{result.adapter_parameters:,} numbers instead of {result.lora_parameters:,} (")


def test_a_model_loaded_for_inference_can_be_fitted(tmp_path: Path) -> None:
    folders = library(tmp_path)
    adapted_model("llama").save_pretrained(tmp_path / "saved")
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path / "saved")
    result = distill(model, folders, steps=5)
    assert result.losses[-1] < result.losses[0]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bad_arguments(tmp_path: Path) -> None:
    model = adapted_model("llama")
    before = snapshot(model)
    folders = library(tmp_path)
    calls: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (["alpha"], {}, TypeError, "adapters=['alpha'] must be a mapping from task name to LoRA folder."),
        ({}, {}, ValueError, "adapters is empty"),
        (folders, {"steps": 0}, ValueError, "steps=0 must be at least 1."),
        (folders, {"steps": 1.5}, TypeError, "steps=1.5 must be an integer"),
        (folders, {"learning_rate": -1.0}, ValueError, "learning_rate=-1.0 must be a finite number above 0."),
        (folders, {"tasks_per_step": 4}, ValueError, "tasks_per_step=4 must be at most 3."),
        ({"delta": tmp_path}, {}, ValueError, f"Unknown task 'delta'. Known tasks: {TASKS}."),
        (folders | {"gamma": tmp_path / "none"}, {}, FileNotFoundError, "The LoRA of task 'gamma'"),
    ]
    for adapters, options, error, message in calls:
        with pytest.raises(error, match=re.escape(message)):
            distill(model, adapters, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lora_of_zero_is_refused(tmp_path: Path) -> None:
    model = adapted_model("llama", active=False)
    with pytest.warns(UserWarning, match="is all zero"):
        export_lora(model, "alpha", tmp_path)
    with pytest.raises(ValueError, match=r"The LoRA of task 'beta' in '.*' is zero: it is untrained\. Leave it out"):
        distill(model, {"beta": tmp_path})


def test_the_adapter_must_be_free_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = library(tmp_path)
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=re.escape("One adapter must be active, but ['default', 'second'] are.")):
        distill(model, folders)
    model = adapted_model("llama")
    model.set_task("beta")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Task 'beta' of adapter 'default' is merged .* Call unmerge_adapter"):
        distill(model, folders)
    model.unmerge_adapter()
    # What it does for a network whose parameters are spread over processes.
    monkeypatch.setattr(distillation, "whole_network", copy.copy)
    with pytest.raises(ValueError, match="Adapter 'default' is sharded over processes"):
        distill(model, folders)
    with pytest.raises(TypeError, match="has no hyperadapter"):
        distill(base_model("llama"), folders)


def test_half_precision_networks_are_fitted(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = base_model("llama").bfloat16()
        config = adapter_config(target_modules="all-linear")
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.bfloat16}
    result = distill(model, library(tmp_path), steps=20, learning_rate=0.02)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("training", [False, True])
def test_tasks_with_descriptions_learn_to_be_known_by_them_alone(tmp_path: Path, training: bool) -> None:
    folders = library(tmp_path)
    texts = {task: f"What {task} does." for task in TASKS}

    def encode(descriptions: list[str]) -> Tensor:
        return torch.eye(8)[[TASKS.index(text.split()[1]) for text in descriptions]]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sources = {"tasks": texts, "task_embedding": "both", "text_encoder": encode}
        config = adapter_config(target_modules="all-linear", normalization="none", **sources)
        model = get_peft_model(base_model("llama"), config).train(training)
    network = model.base_model.router.network("default")
    state = torch.get_rng_state()
    result = distill(model, folders, steps=150, learning_rate=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training == training
    model.eval()
    assert network.task_embedding.weight.any()
    with torch.no_grad():
        network.task_embedding.weight.zero_()
    # Half of the steps left the learned parts out. Fitted in evaluation mode, the first error would grow by 0.08.
    alone = dense_squared_errors(model, folders).sqrt().tolist()
    for error, with_learned in zip(alone, result.error.values(), strict=True):
        assert with_learned < 0.95
        assert error < with_learned + 0.01
