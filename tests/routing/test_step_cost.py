"""What can be known of a training step's cost without a clock: no waiting for the device, few and small operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from hyperadapt.hypernetwork import network as network_module
from hyperadapt.normalization import NORMALIZATIONS
from hyperadapt.normalization.cores import cores
from hyperadapt.tuner.layer import HyperAdapterLayer
from tests.support.example_rows import with_examples
from tests.support.helpers import TASKS, adapted_model, adapter_config, base_model, example_batch, varied

LENGTH = 7


class Operators(TorchDispatchMode):
    """Counts operator calls, and notes the size of the largest result and what takes data between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0
        self.transfers: list[str] = []
        self.copies: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors, results = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, result))
        # A view is no work.
        if not func.is_view:
            self.calls[func.overloadpacket.__name__] += 1
            self.largest = max([self.largest, *(tensor.numel() for tensor in results)])
        # Numbers, tensors without dimensions, travel with the launch of a kernel.
        devices = {tensor.device.type for tensor in (*tensors, *results) if tensor.ndim}
        if len(devices) > 1:
            self.copies += results
            if not kwargs.get("non_blocking"):
                self.transfers.append(str(func))
        return result


def train_step(model: nn.Module, batch: dict[str, Tensor], **routing: Any) -> Operators:
    """One step; the optimiser is the same for every adapter, and left out."""
    model.train()
    # The first call with a task per row also learns where rows lie.
    with torch.autocast("cpu", enabled=False):
        model(**batch, **routing)
    with Operators() as operators:
        model(**batch, **routing).loss.backward()
    return operators


def llama(layers: int) -> LlamaForCausalLM:
    config = base_model("llama").config
    config.num_hidden_layers = layers
    return LlamaForCausalLM(config)


def hyperadapted(layers: int, tasks: int = 3, **changes: Any) -> PeftModel:
    names = [f"task{index}" for index in range(tasks)]
    return get_peft_model(llama(layers), adapter_config(tasks=names, target_modules="all-linear", **changes))


def batch_of(rows: int) -> dict[str, Tensor]:
    return example_batch("llama", rows)


NAMED: dict[str, Any] = {
    "name": "beta",
    "names": ["beta", "alpha", "beta", "beta"],
    "fewer rows than tasks": torch.tensor([2, 0]),
    "more rows than tasks": torch.tensor([2, 0, 1, 1]),
}


def base_step(batch: dict[str, Tensor]) -> Operators:
    """A step of the base model on the device "meta"; old releases of transformers ask it about autocast there."""
    try:
        return train_step(base_model("llama").to("meta"), batch)
    except RuntimeError as error:
        if "unknown device type for autocast" in str(error):
            pytest.skip(str(error))
        raise


# The device "meta" has no values, so a step that looks at one fails there, as it would have to wait on a GPU.
@pytest.mark.parametrize(("normalization", "naming"), varied(("soft_frobenius", "name"), NORMALIZATIONS, NAMED))
def test_a_step_does_not_wait_for_the_device(normalization: str, naming: str) -> None:
    tasks = NAMED[naming]
    model = adapted_model("llama", normalization=normalization, alpha_pattern={"q_proj": 2}).to("meta")
    # Transformers looks at the values of a mask.
    ids = batch_of(4 if isinstance(tasks, str) else len(tasks))["input_ids"].to("meta")
    batch = {"input_ids": ids, "labels": ids}
    assert not base_step(batch).transfers
    operators = train_step(model, batch, tasks=tasks.to("meta") if isinstance(tasks, Tensor) else tasks)
    assert not operators.transfers
    # Of what the host knows, the rows' tasks alone may be new: which they are, and which row has which.
    assert len(operators.copies) <= (0 if isinstance(tasks, Tensor) else 2)
    assert all(copy.numel() <= len(TASKS) or copy.numel() == len(ids) for copy in operators.copies)
    parameters = [parameter for name, parameter in model.named_parameters() if "hyperadapter_" in name]
    assert parameters
    assert all(parameter.grad is not None for parameter in parameters)


def test_a_step_copies_no_table_of_texts_and_examples() -> None:
    model = with_examples("llama", {"alpha": "both", "beta": "text+examples", "gamma": "examples"}).to("meta")
    ids, tasks = batch_of(4)["input_ids"].to("meta"), torch.tensor([2, 0, 1, 1]).to("meta")
    assert not train_step(model, {"input_ids": ids, "labels": ids}, tasks=tasks).copies
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, tasks=tasks)
        with Operators() as operators:
            model(input_ids=ids, tasks=tasks)
    assert not operators.copies


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_a_gpu() -> None:
    model, ids = adapted_model("llama").cuda(), batch_of(4)["input_ids"].cuda()
    batch = {"input_ids": ids, "labels": ids}
    for tasks in ("beta", torch.tensor([2, 0, 1, 1]).cuda()):
        # Kernels are compiled in the first step.
        train_step(model, batch, tasks=tasks)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(model, batch, tasks=tasks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("head", ["row", "factor", "pair"])
def test_kernels_read_factors_where_they_lie(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not contiguous would be copied for them."""
    seen: list[Tensor] = []

    def watch(*arguments: Any) -> Tensor:
        seen.extend(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        return cores(*arguments)

    monkeypatch.setattr(network_module, "cores", watch)
    model = adapted_model("llama", head=head, normalization="sinkhorn", rank_pattern={"q_proj": 2})
    model(**batch_of(3), tasks=TASKS)
    # A, B and what mixes them, of two ranks; the other modules have two shapes or more.
    assert len(seen) >= 3 + 5
    assert all(tensor.is_contiguous() for tensor in seen)


@pytest.mark.parametrize("head", ["row", "factor", "pair"])
def test_generation_takes_as_many_calls_for_any_number_of_layers_and_tasks(head: str) -> None:
    calls = []
    for layers, tasks in ((2, 3), (5, 3), (2, 12)):
        network = hyperadapted(layers, tasks, head=head).base_model.router.network("default")
        with Operators() as operators:
            outputs = [tensor for factors in network(torch.arange(tasks)).values() for tensor in factors]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        operators.calls.pop("ones_like")
        calls.append(operators.calls)
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_layer_takes_no_more_calls_than_lora_for_any_number_of_tasks(autocast: bool) -> None:
    def calls(build: Any, rows: int, **routing: Any) -> int:
        """Of a layer, beyond what the base model's takes."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            counts = [
                train_step(build(layers), batch_of(rows), **routing).calls.total()
                - train_step(llama(layers), batch_of(rows)).calls.total()
                for layers in (2, 3)
            ]
        return counts[1] - counts[0]

    def lora(layers: int) -> PeftModel:
        return get_peft_model(llama(layers), LoraConfig(target_modules="all-linear"))

    def adapted(tasks: int, rows: int) -> int:
        return calls(lambda layers: hyperadapted(layers, tasks), rows, tasks=torch.arange(rows) % tasks)

    assert adapted(3, rows=3) == adapted(12, rows=12) <= calls(lora, rows=3)
    assert adapted(1, rows=3) <= calls(lora, rows=3)
    # Rows that share tasks pick copies of their factors: three, each with its gradient in three calls. Under autocast
    # the product with the core, of the network's dtype, is cast once more, with its gradient.
    more = 12 if autocast else 9
    assert adapted(3, rows=24) == adapted(12, rows=24) <= calls(lora, rows=24) + more * 7


def test_rows_with_a_task_each_copy_no_factors() -> None:
    model = adapted_model("llama")
    distinct, repeated = (
        train_step(model, batch_of(3), tasks=tasks).calls["index"]
        for tasks in (["gamma", "alpha", "beta"], ["gamma", "gamma", "beta"])
    )
    layers = sum(isinstance(module, HyperAdapterLayer) for module in model.modules())
    assert repeated - distinct == 3 * layers


def test_nothing_is_copied_for_each_token() -> None:
    rows, model = 24, hyperadapted(2)
    layers = [module for module in model.modules() if isinstance(module, HyperAdapterLayer)]
    factors = rows * 4 * max(max(layer.in_features, layer.out_features) for layer in layers)
    base = train_step(llama(2), batch_of(rows)).largest
    assert factors * LENGTH > base
    assert train_step(model, batch_of(rows), tasks=torch.arange(rows) % 3).largest <= max(factors, base)
