"""Tiny mixtures whose experts are fused, as transformers has them, and adapters of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support.family import made
from tests.support.family_inputs import VOCABULARY
from tests.support.helpers import adapter_config, make_active

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"]}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "granite moe": ("GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "deepseek v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(name: str = "mixtral", **changes: Any) -> nn.Module:
    """A tiny mixture in float64, which runs its experts one by one."""
    kind, config = MIXTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made(kind, **_SMALL | config | changes)()


def adapted(base: nn.Module, *, active: bool = True, **changes: Any) -> PeftModel:
    """An adapter of all experts, and of nothing else; ``active`` makes the updates differ from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = {"target_parameters": PARAMETERS, "target_modules": []}
        model = get_peft_model(base, adapter_config(**settings | changes)).eval()
    return make_active(model) if active else model


def token_ids(rows: int, length: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def expert_norms(weights: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a stack."""
    return torch.linalg.vector_norm(weights, dim=(1, 2))
