"""Tests of the bound's warm-up: what counts as a step, what it does to the update, and where there is none."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.warmup import BoundWarmup
from tests.hypernetwork.test_network import BASE_NORMS, generate, make_network, norms
from tests.support.helpers import MIXED, adapted_model, base_model, example_batch

BOUND, STEPS = 0.25, 4


def warmed(**changes: Any) -> HyperAdapterNetwork:
    changes = {"normalization": "soft_polar", "normalization_bound": BOUND, "normalization_warmup": STEPS} | changes
    return make_network(**{"init_weights": True} | changes)


def warmup_of(network: HyperAdapterNetwork) -> BoundWarmup:
    assert network.warmup is not None
    return network.warmup


def loss(network: HyperAdapterNetwork) -> Tensor:
    """A function of the updates whose gradient is not zero at zero."""
    torch.manual_seed(1)
    return sum((one.delta_weight() * torch.randn(one.delta_weight().shape)).sum() for one in generate(network).values())


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss(network).backward()
        optimizer.step()
        optimizer.zero_grad()


def shares(network: HyperAdapterNetwork) -> Tensor:
    """Norm of each task's update in units of the whole bound, (tasks, positions)."""
    return norms(generate(network)) / (BOUND * BASE_NORMS)


def test_the_bound_grows_by_the_step_and_is_whole_after_the_last() -> None:
    network = warmed()
    optimizer = torch.optim.SGD(network.parameters(), 1e6)
    for step in range(2 * STEPS):
        share = min(1, (step + 1) / STEPS)
        assert warmup_of(network)(torch.float64) == share
        assert (shares(network) <= share * (1 + 1e-5)).all()
        train(network, optimizer, 1)
    # So high a rate takes all updates of full rank to the bound, which is whole by now.
    assert shares(network).max() > 0.99


def test_gradients_are_those_of_the_smaller_bound() -> None:
    small = warmed(normalization_bound=BOUND / STEPS, normalization_warmup=1)
    network = warmed()
    state = {name: tensor for name, tensor in network.state_dict().items() if "warmup" not in name}
    for one in (small, network):
        one.load_state_dict(state, strict=False)
        with torch.no_grad():
            for parameter in one.hypernetwork.parameters():
                parameter.add_(0.1 * torch.ones_like(parameter))
        loss(one).backward()
    for parameter, expected in zip(network.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_a_step_counts_after_a_forward_pass_that_trains_the_network() -> None:
    network = warmed()
    optimizer, other = torch.optim.AdamW(network.parameters(), 0.1), torch.optim.SGD([torch.zeros(1)], 0.1)
    warmup = warmup_of(network)
    # Gradients that are added up over two batches make one step, and so do two optimizers that share a pass.
    for _ in range(2):
        loss(network).backward()
    optimizer.step()
    other.step()
    assert warmup.trained_steps == 1
    optimizer.step()
    assert warmup.trained_steps == 1
    network.eval()
    loss(network)
    optimizer.step()
    network.train()
    with torch.no_grad():
        loss(network)
    optimizer.step()
    assert warmup.trained_steps == 1
    # As when only a new task's embedding is fitted: the other tasks must stay what they are.
    network.hypernetwork.requires_grad_(False)
    loss(network).backward()
    optimizer.step()
    assert warmup.trained_steps == 1


def test_a_step_that_a_gradient_scaler_leaves_out_does_not_count() -> None:
    network = warmed()
    optimizer, scaler = torch.optim.SGD(network.parameters(), 0.1), torch.amp.GradScaler("cpu")
    for factor, expected in ((torch.inf, 0), (1.0, 1)):
        scaler.scale(factor * loss(network)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert warmup_of(network).trained_steps == expected


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_counts_its_own_steps(duplicate: Any) -> None:
    network = warmed()
    train(network, torch.optim.SGD(network.parameters(), 0.1), 1)
    twin = duplicate(network)
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), 2)
    assert (warmup_of(network).trained_steps, warmup_of(twin).trained_steps) == (1, 3)


def test_passes_of_replicas_count_for_the_network() -> None:
    network = warmed()
    for _ in range(2):
        # What DataParallel calls on each module, for each device.
        warmup_of(network)._replicate_for_data_parallel().expect_step()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    optimizer.step()
    optimizer.step()
    assert warmup_of(network).trained_steps == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_warmup": 1},
        {"normalization": "none", "normalization_bound": None, "normalization_warmup": None},
        {"normalization": "spectral", "normalization_warmup": None},
    ],
    ids=str,
)
def test_where_nothing_grows_nothing_is_counted(changes: dict[str, Any]) -> None:
    network = warmed(**changes)
    assert network.warmup is None
    assert not any("warmup" in name for name in network.state_dict())


def test_a_random_start_has_the_whole_bound_and_gives_it_to_what_takes_its_state() -> None:
    started = warmed(init_weights=False)
    assert warmup_of(started)(torch.float64) == 1
    network = warmed()
    network.load_state_dict(started.state_dict())
    torch.testing.assert_close(shares(network), shares(started), rtol=0, atol=0)


def test_a_gain_takes_no_warmup() -> None:
    with pytest.raises(ValueError, match=r"normalization_warmup=5 has no effect with normalization='spectral'"):
        HyperAdapterConfig(normalization="spectral", normalization_warmup=5)


def tiny_model() -> PeftModel:
    return adapted_model("bert", active=False, init_weights=True, normalization_warmup=STEPS)


def test_an_adapter_saved_during_the_warmup_goes_on_where_it_was(tmp_path: Path) -> None:
    batch, rate = example_batch("bert"), 0.1
    model = tiny_model()

    def run(model: PeftModel, steps: int) -> Tensor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
        model.train()
        for _ in range(steps):
            model(**batch, tasks=MIXED).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return model.eval()(**batch, tasks=MIXED).logits

    before = run(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path, is_trainable=True)
    assert torch.equal(run(loaded, 0), before)
    assert torch.equal(run(loaded, 1), run(model, 1))


def test_a_count_below_zero_in_a_file_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    (name,) = (name for name in state if name.endswith("trained_steps"))
    save_file(state | {name: torch.tensor(-3)}, file)
    with pytest.raises(ValueError, match=r"trained_steps.* counts steps below 0"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)
