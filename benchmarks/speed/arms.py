"""The scenarios and arms of the speed benchmark: models that share their base weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PolyConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.scaling import CONFIGS
from hyperadapt import HyperAdapterConfig

BASES: dict[str, PretrainedConfig] = {
    "minilm": BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6),
    # A small vocabulary: a large one would add the same time to every arm, and hide what adapters cost.
    "qwen-4x256": Qwen2Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": CONFIGS["Qwen2.5-0.5B"],
    "llama-3-8b": CONFIGS["Llama-3-8B"],
}
RANK = 8
POLY_SKILLS = 4
MIXED, PINNED, MERGED = "hyperadapt mixed", "hyperadapt pinned", "hyperadapt merged"
LORA, LORA_NAMES = "lora", "lora adapter_names"
INFERENCE = ("base", LORA, LORA_NAMES, "poly", MIXED, PINNED, MERGED)
TRAINING = (LORA, "poly", MIXED)
# The default against the one that costs least.
NORMALIZED = {f"hyperadapt {name}": name for name in ("soft_frobenius", "soft_polar")}
ARMS = {
    "training": TRAINING,
    "memory": TRAINING,
    "forward": INFERENCE,
    "generation": INFERENCE,
    "cold start": ("base", LORA, PINNED, MERGED),
    "normalization": tuple(NORMALIZED),
}
# Poly and adapter_names do not compile into one graph; a CUDA graph has the same arms.
COMPILED_ARMS = {"training": (LORA, MIXED), "forward": ("base", LORA, MIXED, PINNED, MERGED)}
EAGER, GRAPH, COMPILED, COMPILED_GRAPH = "eager", "graph", "compiled", "compiled-graph"
# By mode, the arms of each measure. What takes longest comes last, and first the modes that need no compilation.
MODES = {EAGER: ARMS, **dict.fromkeys((GRAPH, COMPILED, COMPILED_GRAPH), COMPILED_ARMS)}
GPU_MODES = (GRAPH, COMPILED_GRAPH)


@dataclass(frozen=True)
class Scenario:
    """One setting in which arms are compared.

    Attributes:
        base: Name of the base model.
        batch: Rows of a batch.
        length: Tokens of a row.
        tasks: Number of tasks K; row i has task i mod K.
        new_tokens: Tokens that generation adds.
        measures: What is measured, keys of ``ARMS``.
        modes: How that runs, keys of ``MODES``.
        gpu: Whether this runs on a GPU only.
    """

    base: str = "qwen-4x256"
    batch: int = 16
    length: int = 64
    tasks: int = 16
    new_tokens: int = 16
    measures: Sequence[str] = ("training", "memory", "forward")
    modes: Sequence[str] = (EAGER,)
    gpu: bool = False

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [f"task{index}" for index in range(self.tasks)]


@dataclass
class Subject:
    """One arm's model.

    Attributes:
        model: The model.
        routing: Arguments of a call that say the tasks of the rows.
    """

    model: Any
    routing: dict[str, Any] = field(default_factory=dict)


def build_base(name: str, device: torch.device) -> nn.Module:
    """A base model with random weights: float32 on a CPU, bfloat16 on a GPU.

    Args:
        name: Its name.
        device: Where it is made.

    Returns:
        The model, frozen, in evaluation mode.
    """
    config = copy.deepcopy(BASES[name])
    config.pad_token_id = 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    factory: Any = AutoModel if is_encoder(config) else AutoModelForCausalLM
    # Sentence encoders take the mean over tokens.
    options = {"add_pooling_layer": False} if is_encoder(config) else {}
    with device:
        model: nn.Module = factory.from_config(config, dtype=dtype, **options)
    return model.requires_grad_(False).eval()


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a base model has no head for tokens, and so neither labels nor generation.

    Args:
        config: Its configuration.

    Returns:
        Whether it is an encoder.
    """
    return isinstance(config, BertConfig)


def build_subject(arm: str, base: nn.Module, scenario: Scenario) -> Subject:
    """One arm's model; the base model itself stays as it is.

    Args:
        arm: Name of the arm.
        base: The base model, whose weights all arms share but the merged one.
        scenario: The scenario.

    Returns:
        The arm, in evaluation mode.
    """
    shared = {} if arm == MERGED else {id(parameter): parameter for parameter in base.parameters()}
    model, names = copy.deepcopy(base, shared), scenario.names
    ids = torch.arange(scenario.batch, device=next(base.parameters()).device) % scenario.tasks
    task_type = "FEATURE_EXTRACTION" if is_encoder(BASES[scenario.base]) else "CAUSAL_LM"
    common: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "task_type": task_type}
    if arm == "base":
        return Subject(model)
    if arm == "poly":
        poly = PolyConfig(n_tasks=scenario.tasks, n_skills=POLY_SKILLS, **common)
        return Subject(get_peft_model(model, poly).eval(), {"task_ids": ids})
    if arm in (LORA, LORA_NAMES):
        lora: PeftConfig = LoraConfig(lora_alpha=RANK, **common)
        peft_model = get_peft_model(model, lora, names[0])
        for name in names[1:] if arm == LORA_NAMES else ():
            peft_model.add_adapter(name, lora)
        routing = {"adapter_names": [names[index] for index in ids.tolist()]} if arm == LORA_NAMES else {}
        return Subject(peft_model.eval(), routing)
    if arm in NORMALIZED:
        common["normalization"] = NORMALIZED[arm]
    peft_model = get_peft_model(model, HyperAdapterConfig(tasks=names, **common)).eval()
    if arm == MIXED or arm in NORMALIZED:
        return Subject(peft_model, {"tasks": ids})
    # As from_pretrained loads it: factors are kept for what is not trained.
    peft_model.requires_grad_(False).set_task(names[0])
    if arm == MERGED:
        peft_model.merge_adapter()
    return Subject(peft_model)


def example_batch(scenario: Scenario, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, without padding.

    Args:
        scenario: The scenario.
        device: The device.

    Returns:
        ``input_ids`` and ``attention_mask``, both of shape ``(batch, length)``, int64.
    """
    ids = torch.randint(1, BASES[scenario.base].vocab_size, (scenario.batch, scenario.length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
