"""Tiny random models of five architectures, their batches, and adapters that visibly change them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from examples.support.text_tasks import encoder_path
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.normalization.formulas import METHODS

ROOT = Path(__file__).resolve().parents[2]


def varied(reference: tuple[Any, ...], *axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases that differ from a reference in one value: each value of each axis once, not every combination."""
    cases = [(*reference[:i], value, *reference[i + 1 :]) for i, axis in enumerate(axes) for value in axis]
    return list(dict.fromkeys([reference, *cases]))


TASKS = ["alpha", "beta", "gamma"]
MIXED = ["beta", "alpha", "gamma", "beta"]
ROWS = len(MIXED)
VOCABULARY = 100
WRITES_COMPLEX = Version(safetensors.__version__) >= Version("0.7")

# The usual weights, of size 0.02, give such small models nearly constant outputs; dropout hides equalities.
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**_SIZES, **_DROPOUT, **_TEXT, max_position_embeddings=32, num_labels=3)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            **_TEXT,
            **_IDS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, **_TEXT, **_IDS, num_key_value_heads=2, max_position_embeddings=32)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**_SIZES, **_DROPOUT, initializer_range=0.2, image_size=16, patch_size=8, num_labels=3)
    ),
}
ARCHITECTURES = tuple(_MAKERS)
TASK_TYPES = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None}


def base_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode; the same name and seed give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKERS[name]().eval()


def example_batch(name: str, rows: int = ROWS, *, seed: int = 3, labels: bool = True) -> dict[str, Tensor]:
    """Random inputs; the last row of a text batch is padded where the architecture takes a mask."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        batch = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    else:
        batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, 7), generator=generator)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if name in ("bert", "t5"):
            batch["attention_mask"][-1, 5:] = 0
    if labels:
        if name in ("bert", "vit"):
            batch["labels"] = torch.arange(rows) % 3
        elif name == "t5":
            batch["labels"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
        else:
            batch["labels"] = batch["input_ids"].clone()
    elif name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return batch


def double(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch for a model in float64, where rounding cannot hide a mistake."""
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def row_of(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in batch.items()}


def adapter_config(**changes: Any) -> HyperAdapterConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "tasks": list(TASKS),
        "task_embedding_dim": 8,
        "hypernetwork_dim": 16,
        "hypernetwork_depth": 1,
    }
    if "normalization" not in changes:
        # More than the default, so that the tasks of tiny models differ clearly.
        settings["normalization_bound"] = 0.5
    if METHODS[changes.get("normalization", HyperAdapterConfig.normalization)].is_bounded:
        # Tests set updates that no training has led to.
        settings["normalization_warmup"] = 1
    return HyperAdapterConfig(**settings | changes)


def adapted_model(name: str, *, active: bool = True, seed: int = 0, **changes: Any) -> PeftModel:
    """A model in eval mode, adapted on all linear layers; ``active`` makes the updates differ from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        config = adapter_config(**{"target_modules": "all-linear"} | changes)
        model = get_peft_model(base_model(name, seed), config)
    return make_active(model) if active else model


def full_core(factors: Factors) -> Tensor:
    """The core of each task as a matrix, shape (tasks, r, r)."""
    r = factors.lora_A.shape[-2]
    return factors.core * torch.eye(r) if factors.core.shape[-1] < r else factors.core


def two_adapters() -> PeftModel:
    model = adapted_model("llama")
    torch.manual_seed(7)
    model.add_adapter("second", adapter_config(tasks=["one", "two"], target_modules=["q_proj", "up_proj"], r=2))
    return make_active(model)


def make_active(model: PeftModel, seed: int = 2) -> PeftModel:
    """Move all that starts at zero (heads and shared factors of B, gains) to values that change the outputs a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hyperadapter_" not in name:
                continue
            if ".heads.B_" in name:
                parameter.normal_(generator=generator)
            elif ".shared.B_" in name:
                # As large as what the heads emit, whose inputs they divide by 16: tasks are to differ clearly.
                parameter.normal_(std=0.25, generator=generator)
            elif name.endswith("gain"):
                parameter.uniform_(0.3, 0.6, generator=generator)
    return model.eval()


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Renamed in transformers 5.23.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(base, name) for name in names if hasattr(base, name))
    enable({"use_reentrant": use_reentrant})


def checkpointing_arguments(use_reentrant: bool = False) -> dict[str, Any]:
    """For ``TrainingArguments``."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    marker = f"hyperadapter_networks.{adapter_name}."
    return {name: parameter for name, parameter in model.named_parameters() if marker in name}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base model under their own names."""
    return {
        name.replace("base_model.model.", "", 1).replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "hyperadapter_" not in name
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, by parameter name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Tensor], **routing: Any) -> Tensor:
    return model(**batch, **routing).logits


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that treats warnings as this test run does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # See the same entry of pyproject.toml.
    ignored = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    command = [sys.executable, "-W", "error", "-W", ignored, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result


def letters(texts: list[str]) -> Tensor:
    """A text encoder of size 26: how often each letter occurs, weighted by where."""
    vectors = torch.full((len(texts), 26), 0.01)
    for row, text in enumerate(texts):
        for place, letter in enumerate(text.lower()):
            if "a" <= letter <= "z":
                vectors[row, ord(letter) - ord("a")] += 1 / (1 + place)
    return vectors


def wide_letters(texts: list[str]) -> Tensor:
    """The same in vectors of size 32, which the small models' layers read, for ``conditioning="bilinear"``."""
    return torch.nn.functional.pad(letters(texts), (0, 6), value=0.5)


BILINEAR: dict[str, Any] = {"text_encoder": wide_letters, "conditioning": "bilinear", "task_embedding_dim": 32}


def minilm() -> str:
    """Folder of a sentence-transformers model; skips the test where it or its library is not installed."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    try:
        return str(encoder_path())
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
