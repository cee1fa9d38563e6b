"""Norms and saturation against dense updates, and norms of gradients against those of the factors."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.utils import logging

from hyperadapt.trainer import HyperAdapterTrainer
from hyperadapt.trainer.monitor import PositionMonitor
from tests.routing.test_step_cost import train_step
from tests.support.helpers import MIXED, adapted_model, example_batch, gradients
from tests.support.tolerances import NORM_FLOAT32
from tests.trainer.test_trainer import arguments, data


def test_norms_are_those_of_the_updates_and_of_their_gradients() -> None:
    model = adapted_model("bert", normalization="whitening").double().train()
    network = model.base_model.router.network("default")
    monitor = PositionMonitor(network)
    kept = {}
    network.register_forward_hook(lambda module, inputs, factors: kept.update(factors))
    batch = example_batch("bert")
    squares = dict.fromkeys((position.name for position in network.positions), 0.0)
    for tasks in (MIXED, ["alpha"] * 4):
        model.zero_grad()
        output = model(**batch, tasks=tasks)
        tensors = {name: (factors.lora_A, factors.lora_B) for name, factors in kept.items()}
        for pair in tensors.values():
            for tensor in pair:
                tensor.retain_grad()
        output.loss.backward()
        for name, (A, B) in tensors.items():
            squares[name] += float(A.grad.square().sum() + B.grad.square().sum())
    with torch.no_grad():
        model(**batch, tasks=MIXED)
        # The largest of all tasks, though the second pass had only the first.
        factors = network(network.task_embedding.weight)
        dense = {name: f.delta_weight().norm(dim=(1, 2)).max() for name, f in factors.items()}
    updates, of_factors, _ = monitor.collect()
    for position, base_norm in zip(network.positions, network.base_norms, strict=True):
        name = position.name
        # The monitor counts in float32.
        assert_close(updates[name], float(dense[name] / base_norm), rtol=NORM_FLOAT32, atol=0)
        assert_close(of_factors[name], (squares[name] / 2) ** 0.5, rtol=NORM_FLOAT32, atol=0)
    assert monitor.collect() == ({}, {}, None)
    model.eval()(**batch, tasks=MIXED)
    assert monitor.collect() == ({}, {}, None)


# With these bounds some updates are at them and some are not.
@pytest.mark.parametrize(("method", "bound"), [("soft_frobenius", 0.56), ("soft_polar", 0.7)])
def test_saturation_counts_each_task_of_each_pass(method: str, bound: float) -> None:
    model = adapted_model("bert", normalization=method, normalization_bound=bound).train()
    network = model.base_model.router.network("default")
    monitor = PositionMonitor(network)
    at_bound: dict[str, Tensor] = {}
    with torch.no_grad():
        factors = network(torch.arange(3))
        for position, base_norm in zip(network.positions, network.base_norms, strict=True):
            spectra = torch.linalg.svdvals(factors[position.name].delta_weight())
            sizes = 2 * spectra[:, 0] if method == "soft_polar" else spectra.norm(dim=1)
            at_bound[position.name] = (sizes / (bound * base_norm) >= 0.9).double()
    assert monitor.collect() == ({}, {}, None)
    batch = example_batch("bert")
    for tasks in (MIXED, ["alpha"] * 4, ["gamma", "alpha", "gamma", "alpha"]):
        model(**batch, tasks=tasks).loss.backward()
    saturation = monitor.collect()[2]
    # The passes had all tasks, the first, and the first and third.
    shares = {name: (one.mean() + one[0] + one[[0, 2]].mean()) / 3 for name, one in at_bound.items()}
    layers = {f"layer_{index}": [share for name, share in shares.items() if f".{index}." in name] for index in range(2)}
    layers["no_layer"] = [share for name, share in shares.items() if ".layer." not in name]
    assert 0 < saturation.share < 1
    assert saturation.share == pytest.approx(float(torch.stack(list(shares.values())).mean()))
    assert saturation.layers == pytest.approx({name: float(torch.stack(one).mean()) for name, one in layers.items()})


def test_an_update_that_is_not_finite_is_not_at_its_bound() -> None:
    model = adapted_model("bert", normalization="soft_polar").train()
    network = model.base_model.router.network("default")
    monitor = PositionMonitor(network)
    with torch.no_grad():
        network.task_embedding.weight[1] = torch.nan
    model(**example_batch("bert"), tasks=MIXED)
    updates, _, saturation = monitor.collect()
    assert not any(map(math.isfinite, updates.values()))
    assert saturation.share == pytest.approx(2 / 3)


def test_gradients_are_the_same_with_a_monitor() -> None:
    found = []
    for watched in (False, True):
        model = adapted_model("bert", normalization="soft_polar").train()
        if watched:
            PositionMonitor(model.base_model.router.network("default"))
        model(**example_batch("bert"), tasks=MIXED).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# The device "meta" has no values, so what looks at one fails there, as it would have to wait on a GPU.
@pytest.mark.parametrize("method", ["soft_frobenius", "soft_polar", "adaptive", "spectral"])
def test_watching_does_not_wait_for_the_device(method: str) -> None:
    model = adapted_model("llama", normalization=method).to("meta")
    PositionMonitor(model.base_model.router.network("default"))
    ids = example_batch("llama")["input_ids"].to("meta")
    assert not train_step(model, {"input_ids": ids, "labels": ids}, tasks="beta").transfers


@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_updates_at_their_bound_are_logged_and_told_once(
    bound: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted_model("bert", normalization_bound=bound, normalization="soft_frobenius")
    trainer = HyperAdapterTrainer(
        model, arguments(tmp_path, logging_steps=1), train_dataset=data("bert"), log_positions=True
    )
    logging.enable_propagation()
    try:
        trainer.train()
    finally:
        logging.disable_propagation()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert len(logs) == 4
    shares = [{key: entry[key] for key in entry if key.startswith("saturated_share")} for entry in logs]
    names = ["saturated_share", *(f"saturated_share/{layer}" for layer in ("layer_0", "layer_1", "no_layer"))]
    assert all(sorted(share) == names for share in shares)
    if bound == 100:
        assert all(value == 0 for share in shares for value in share.values())
        assert not caplog.records
        assert "bound (90%" not in card
        return
    assert all(share["saturated_share"] > 0.5 for share in shares)
    [message] = [record.getMessage() for record in caplog.records]
    first, last = (f"{shares[step]['saturated_share']:.0%} of the updates are at their bound" for step in (0, -1))
    assert message.startswith(f"Step 1: {first} (90% of it or more)")
    assert message.endswith("lower it. If it is a rate at which a LoRA trains, raise normalization_bound.")
    assert last in card
    assert "raise normalization_bound." in card
