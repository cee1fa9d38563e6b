"""What is predicted without memory, against real models and files."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from examples import scaling
from hyperadapt import HyperAdapterConfig
from tests.helpers import adapted_model, adapter_parameters, base_model, example_batch

OPTIONS: list[dict[str, Any]] = [
    {},
    {"head": "row", "normalization": "spectral"},
    {"head": "pair", "normalization": "sinkhorn", "rank_pattern": {"q_proj": 2}},
]


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
    model.train()(**batch, tasks=["alpha", "beta", "gamma", "alpha"]).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    assert predicted.training_bytes == sum(tensor.nbytes for tensor in held)

    network = model.base_model.router.network("default")
    factors = network(torch.arange(3))
    assert predicted.factor_bytes == sum(tensor.nbytes for position in factors.values() for tensor in position)
    with FlopCounterMode(display=False) as counter:
        network(torch.arange(3))
    assert predicted.generation_flops == counter.get_total_flops() > 0
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
    started = time.monotonic()
    scaling.main()
    assert time.monotonic() - started < 120
    rows = re.findall(r"^ 10,000 +([\d,]+) +([\d,]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 3
    for mine, loras in rows:
        assert 100 * int(mine.replace(",", "")) < int(loras.replace(",", ""))
