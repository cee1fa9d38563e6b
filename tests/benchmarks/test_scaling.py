"""What is predicted without memory, against real models and files."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import scaling
from benchmarks.normalization import MODELS
from hyperadapt import HyperAdapterConfig
from tests.support.helpers import adapted_model, adapter_config, adapter_parameters, base_model, example_batch

OPTIONS: list[dict[str, Any]] = [
    {},
    {"head": "row", "normalization": "spectral"},
    {"head": "pair", "normalization": "sinkhorn", "rank_pattern": {"q_proj": 2}},
]


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that takes memory."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
                self.largest = max(self.largest, value.nbytes)
        return result


@pytest.mark.parametrize("options", OPTIONS)
def test_predictions_are_those_of_a_real_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted_model("llama", task_type="CAUSAL_LM", **options)
    adapter = model.peft_config["default"]
    config = HyperAdapterConfig(
        **{
            key: getattr(adapter, key)
            for key in vars(adapter)
            if key not in ("peft_type", "auto_mapping", "target_modules")
        },
        target_modules="all-linear",
    )
    predicted = scaling.costs(base_model("llama").config, config, batch_size=4, length=7, tasks_per_batch=3)
    parameters = list(adapter_parameters(model).values())
    assert predicted.base_parameters == sum(parameter.numel() for parameter in base_model("llama").parameters())
    assert predicted.parameters == sum(parameter.numel() for parameter in parameters)

    model.save_pretrained(tmp_path)
    assert predicted.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size

    optimizer = torch.optim.AdamW(parameters)
    batch = {key: value for key, value in example_batch("llama").items() if key != "attention_mask"}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(**batch, tasks=["alpha", "beta", "gamma", "alpha"]).loss
    loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    assert predicted.training_bytes == sum(tensor.nbytes for tensor in held)

    # Batches of 4 matrices, none of whose sides is the number of tokens, 7; a norm's statistics have a side of 7, too.
    copies = [tensor for tensor in saved.values() if tensor.ndim == 3 and len(tensor) == 4]
    copied = sum(tensor.nbytes for tensor in copies if 7 not in tensor.shape[1:])
    network = model.base_model.router.network("default")
    # The embeddings need no gradient, so what reads them keeps no A.
    first = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    unread = [position for position in network.positions if position.name.endswith(first)]
    assert predicted.row_bytes == copied + sum(4 * 4 * position.r * position.in_features for position in unread)

    factors = network(torch.arange(3))
    assert predicted.factor_bytes == sum(tensor.nbytes for position in factors.values() for tensor in position)
    with FlopCounterMode(display=False) as counter:
        network(torch.arange(3))
    # The counter does not see into our operator: r x r products over the width of each factor, for three tasks.
    widths = [(position.r, position.in_features + position.out_features) for position in network.positions]
    grams = sum(2 * 3 * r * r * width for r, width in widths)
    assert predicted.generation_flops == counter.get_total_flops() + grams
    # By hand: two operations for each weight of a matrix and each token, the attention's two products of 7 x 7 aside.
    base = base_model("llama")
    assert isinstance(base, LlamaForCausalLM)
    weights = sum(
        parameter.numel() for name, parameter in base.named_parameters() if "proj" in name or "lm_head" in name
    )
    attention = base.config.num_hidden_layers * 2 * 2 * 4 * 7 * 7 * base.config.hidden_size
    assert predicted.base_flops == 2 * weights * 4 * 7 + attention


def test_separate_loras(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = scaling.adapted(base_model("llama").config, config)
    predicted = scaling.file_bytes(scaling.get_peft_model_state_dict(model))
    real = scaling.get_peft_model(base_model("llama"), config)
    real.save_pretrained(tmp_path)
    assert predicted == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert scaling.trainable_parameters(model) == scaling.trainable_parameters(real)


def test_large_models_and_many_tasks_take_no_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--tasks", "10000"])
    with Allocations() as allocations:
        scaling.main()
    # Indices and norms, one per position or task; the smallest head of the smallest model takes 260 kB.
    assert allocations.largest <= 8 * 10_000
    rows = re.findall(r"^ 10,000 +([\d,]+) +([\d,]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 3
    for mine, loras in rows:
        assert 100 * int(mine.replace(",", "")) < int(loras.replace(",", ""))


@pytest.mark.parametrize(("name", "key"), [("Qwen2.5-0.5B", "qwen2.5-0.5b"), ("Llama-3-8B", "llama-3-8b")])
def test_configurations_are_those_of_the_benchmark(name: str, key: str) -> None:
    layers, shapes = MODELS[key]
    model = scaling.adapted(scaling.CONFIGS[name], adapter_config(task_type="CAUSAL_LM", target_modules="all-linear"))
    positions = model.base_model.router.network("default").positions
    counts = Counter((position.in_features, position.out_features) for position in positions)
    expected: Counter[tuple[int, int]] = Counter()
    for in_features, out_features, count in shapes:
        expected[in_features, out_features] += layers * count
    assert counts == expected


def test_a_batch_has_no_more_tasks_than_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base_model("llama").config.save_pretrained(tmp_path)
    outputs = []
    for tasks in ("2", "5"):
        arguments = ["--config", str(tmp_path), "--batch-size", "2", "--tasks-per-batch", tasks]
        monkeypatch.setattr("sys.argv", ["scaling", *arguments])
        scaling.main()
        outputs.append(re.findall(r"^ +[\d,]+ .*%$", capsys.readouterr().out, re.MULTILINE))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 3
