"""Adapters of fused experts: every architecture, every way to run them, mixed batches, merging, several adapters."""

from __future__ import annotations

import threading

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyperadapt.normalization.formulas import NORMALIZATIONS
from hyperadapt.tuner.experts import HyperAdapterExperts
from hyperadapt.tuner.stacked_weights import StackedWeights
from tests.support.experts import MIXTURES, PARAMETERS, adapted, expert_norms, mixture, token_ids
from tests.support.helpers import TASKS, adapter_parameters, base_weights, enable_checkpointing, gradients, logits

EXACT = {"rtol": 0.0, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def losses(model: nn.Module, ids: Tensor, tasks: list[str]) -> Tensor:
    """A sum that every logit takes part in, in the dtype of the model; its own loss is in float32."""
    found: Tensor = model(input_ids=ids, tasks=tasks).logits
    return (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum()


@pytest.mark.parametrize("name", MIXTURES)
def test_life_of_an_adapter_of_experts(name: str) -> None:
    base = mixture(name)
    ids = token_ids(3)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    model = adapted(base, active=False)
    before = base_weights(model)
    batch = {"input_ids": ids}
    assert torch.equal(logits(model, batch, tasks=TASKS[0]), expected)
    model = adapted(model.unload())
    alone = [logits(model, batch, tasks=task) for task in TASKS[:2]]
    assert min(float((one - expected).abs().max()) for one in alone) > 1e-3
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3
    mixed = logits(model, batch, tasks=[TASKS[0], TASKS[1], TASKS[0]])
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1], alone[0][2]]), **EXACT)
    model.base_model.set_task(TASKS[1])
    assert torch.equal(logits(model, batch), alone[1])
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, batch), alone[1], **EXACT)
    model.unmerge_adapter()
    torch.testing.assert_close(base_weights(model), before, **EXACT)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, HyperAdapterExperts) for module in merged.modules())
    torch.testing.assert_close(logits(merged, batch), alone[1], **EXACT)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_are_the_differences_of_the_output(name: str) -> None:
    model, outputs = adapted(mixture(name)), []
    # Norms, which come after it, are in float32, whose rounding is larger than the differences.
    layers = [module for name, module in model.named_modules() if name.endswith(".experts")]
    layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def weighted_sum() -> Tensor:
        model(input_ids=token_ids(3), tasks=[TASKS[0], TASKS[1], TASKS[0]])
        found: Tensor = outputs[-1]
        return (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum()

    weighted_sum().backward()
    generator = torch.Generator().manual_seed(5)
    parameters = adapter_parameters(model).values()
    directions = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in parameters]
    slope = sum(float((one.grad * way).sum()) for one, way in zip(parameters, directions, strict=True))
    step, found = 1e-6, []
    for size in (step, -2 * step):
        with torch.no_grad():
            for one, way in zip(parameters, directions, strict=True):
                one.add_(way, alpha=size)
            found.append(float(weighted_sum()))
    assert slope == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_experts(implementation: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixture("gpt-oss" if transposed else "mixtral").float()
    ids, tasks = token_ids(3), [TASKS[0], TASKS[1], TASKS[0]]
    model = adapted(base, r=2)
    expected, loss = logits(model, {"input_ids": ids}, tasks=tasks), losses(model, ids, tasks)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    base.config._experts_implementation = implementation
    # No sum of weights and updates, not of a single expert.
    monkeypatch.setattr(StackedWeights, "dense", None)
    torch.testing.assert_close(logits(model, {"input_ids": ids}, tasks=tasks), expected, **FLOAT32)
    losses(model, ids, tasks).backward()
    torch.testing.assert_close(gradients(model), wanted, **FLOAT32)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that is made, other than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **kwargs or {})
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_update_is_formed_for_training(implementation: str) -> None:
    base = mixture("mixtral", hidden_size=64, intermediate_size=96).float()
    base.config._experts_implementation = implementation
    model = adapted(base, r=2, hypernetwork_dim=4)
    stack = 4 * 2 * 96 * 64
    with _Largest() as largest:
        losses(model, token_ids(2, 3), list(TASKS[:2])).backward()
    # As much as the base model itself takes: the weight of one expert.
    assert 0 < largest.elements <= stack / 4


def test_each_expert_keeps_the_bound_of_its_own_weight() -> None:
    base = mixture()
    experts = base.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj.mul_(torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None])
    model = adapted(base, normalization="soft_frobenius", normalization_bound=0.25)
    model.base_model.set_task(TASKS[0])
    for layer in model.base_model.model.model.layers[0].mlp.experts.layers():
        found = expert_norms(layer.get_delta_weight("default")) / expert_norms(layer.weight)
        assert (found < 0.25).all()
        assert (found > 0.1).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("head", ["row", "pair"])
def test_every_normalization_and_head(normalization: str, head: str) -> None:
    base = mixture()
    batch = {"input_ids": token_ids(2)}
    with torch.no_grad():
        expected = base(**batch).logits
    changes = {"normalization": normalization, "head": head, "target_modules": ["q_proj"], "lora_alpha": 2}
    model = adapted(base, active=False, **changes)
    assert torch.equal(logits(model, batch, tasks=TASKS[0]), expected)
    model = adapted(model.unload(), **changes)
    alone = [logits(model, batch, tasks=task) for task in TASKS[:2]]
    assert float((alone[0] - alone[1]).abs().max()) > 1e-4
    mixed = logits(model, batch, tasks=list(TASKS[:2]))
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), **EXACT)
    model.base_model.set_task(TASKS[1])
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), alone[1], **EXACT)


def test_experts_differ_and_cost_a_row_of_one_table() -> None:
    def size(experts: int) -> int:
        model = adapted(mixture(num_local_experts=experts, num_hidden_layers=2), active=False)
        return sum(one.numel() for one in adapter_parameters(model).values())

    assert size(8) - size(4) == 4 * 8
    model = adapted(mixture())
    model.base_model.set_task(TASKS[0])
    update = model.base_model.model.model.layers[0].mlp.experts.get_delta_weight("default")
    assert float((update[0] - update[1]).norm() / update[0].norm()) > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = adapted(mixture(num_hidden_layers=2), target_modules=["q_proj"]).train()
    ids, tasks = token_ids(3), [TASKS[0], TASKS[1], TASKS[0]]
    losses(model, ids, tasks).backward()
    expected = gradients(model)
    model.zero_grad()
    enable_checkpointing(model, use_reentrant)
    losses(model, ids, tasks).backward()
    torch.testing.assert_close(gradients(model), expected, **EXACT)


def test_modules_and_parameters_of_several_adapters() -> None:
    model = adapted(mixture(), target_modules=["q_proj", "o_proj"])
    model.add_adapter("second", adapted(mixture(), active=False, target_modules=[], r=2).peft_config["default"])
    batch = {"input_ids": token_ids(2)}
    first = logits(model, batch, tasks=TASKS[0])
    assert torch.equal(logits(model, batch, tasks=TASKS[0]), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model, batch, tasks=TASKS[0]), first)
    model.base_model.set_adapter(["default", "second"])
    # The second one has not been trained.
    torch.testing.assert_close(logits(model, batch, tasks=TASKS[0]), first, **EXACT)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model, batch, tasks=TASKS[0]), first, **EXACT)
    assert len({name for name, _ in model.named_modules() if name.endswith("experts.base_layer.base_layer")}) == 1


def test_rows_of_a_step_of_generation() -> None:
    model = adapted(mixture())
    ids = token_ids(3)
    tasks = [TASKS[1], TASKS[0], TASKS[2]]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, tasks=tasks, **settings)
    alone = [model.generate(input_ids=ids[row, None], tasks=task, **settings)[0] for row, task in enumerate(tasks)]
    assert torch.equal(together, torch.stack(alone))


def test_threads_with_other_tasks_do_not_meet() -> None:
    model = adapted(mixture())
    batch = {"input_ids": token_ids(2)}
    expected = {task: logits(model, batch, tasks=task) for task in TASKS[:2]}
    wrong: list[str] = []

    def ask(task: str) -> None:
        wrong.extend(task for _ in range(20) if not torch.equal(logits(model, batch, tasks=task), expected[task]))

    threads = [threading.Thread(target=ask, args=(task,)) for task in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    batch = {"input_ids": token_ids(2)}
    expected = logits(adapted(mixture().float()), batch, tasks=list(TASKS[:2]))
    model = adapted(mixture().to(dtype))
    found = logits(model, batch, tasks=list(TASKS[:2]))
    assert found.dtype == dtype
    # Of eight bits of a mantissa, a few sums.
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


def test_autocast() -> None:
    model = adapted(mixture().float())
    batch = {"input_ids": token_ids(2)}
    expected = logits(model, batch, tasks=list(TASKS[:2]))
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, batch, tasks=list(TASKS[:2]))
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


def test_offloaded_experts_are_brought_in() -> None:
    batch = {"input_ids": token_ids(3)}
    tasks = [TASKS[0], TASKS[1], TASKS[0]]
    expected = logits(adapted(mixture()), batch, tasks=tasks)
    base = mixture()
    accelerate.cpu_offload(base, execution_device="cpu")
    experts = base.model.layers[0].mlp.experts
    assert experts.gate_up_proj.is_meta
    model = adapted(base)
    assert torch.equal(logits(model, batch, tasks=tasks), expected)
    assert experts.gate_up_proj.is_meta


class OwnExperts(nn.Module):
    """A module of experts that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 6, 16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ti->teo", self.weights, x).softmax(1).sum(1)


class OwnMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16, dtype=torch.float64)
        self.mixture = OwnExperts()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mixture(self.embedding(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)


def test_unknown_experts_get_whole_weights_and_one_task() -> None:
    torch.manual_seed(0)
    base = OwnMixture().eval()
    model = adapted(base, target_parameters=["mixture.weights"])
    ids = token_ids(2) % 64
    with torch.no_grad():
        found = model(input_ids=ids, tasks=TASKS[0])
        with pytest.raises(
            ValueError, match=r"Module 'mixture' of type OwnExperts got tokens of several tasks.*one task per"
        ):
            model(input_ids=ids, tasks=list(TASKS[:2]))
        model.base_model.set_task(TASKS[0])
        torch.testing.assert_close(model.merge_and_unload()(input_ids=ids), found, **EXACT)


def test_the_layers_of_a_module_show_their_parameters() -> None:
    shown = str(adapted(mixture(), target_parameters=PARAMETERS[:1]))
    assert "parameter_name='gate_up_proj'" in shown
    assert "down_proj" not in shown
