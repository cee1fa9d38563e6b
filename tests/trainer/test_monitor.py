"""Norms by position against dense updates and against gradients of the factors."""

import torch
from torch.testing import assert_close

from hyperadapt.trainer.monitor import PositionMonitor
from tests.support.helpers import MIXED, adapted_model, example_batch
from tests.support.tolerances import NORM_FLOAT32


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
    updates, gradients = monitor.collect()
    for position, base_norm in zip(network.positions, network.base_norms, strict=True):
        name = position.name
        # The monitor counts in float32.
        assert_close(updates[name], float(dense[name] / base_norm), rtol=NORM_FLOAT32, atol=0)
        assert_close(gradients[name], (squares[name] / 2) ** 0.5, rtol=NORM_FLOAT32, atol=0)
    assert monitor.collect() == ({}, {})
    model.eval()(**batch, tasks=MIXED)
    assert monitor.collect() == ({}, {})
