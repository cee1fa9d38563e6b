"""What vLLM 0.33.0 offers to a LoRA resolver, and what it does with the answers, for where it is not installed.

`python -m tests.vllm_interface` compares the signatures here with those of a release.
"""

import asyncio
import json
import logging
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class LoRARequest:
    """Of vllm/lora/request.py, where it is a struct of msgspec."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


class LoRAResolver(ABC):
    """Of vllm/lora/resolver.py."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class _LoRAResolverRegistry:
    """Of vllm/lora/resolver.py."""

    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def get_supported_resolvers(self) -> Set[str]:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


def init_logger(name: str) -> logging.Logger:
    """Of vllm/logger.py."""
    return logging.getLogger(name)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``vllm`` and the modules that a resolver imports importable, and empty of resolvers."""
    contents = {
        "vllm": {},
        "vllm.envs": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True},
        "vllm.logger": {"init_logger": init_logger},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": _LoRAResolverRegistry()},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


class Server:
    """What vllm/entrypoints/openai/models/serving.py and a worker do with what resolvers answer.

    A name is resolved once; what the worker has forgotten since it reads from the folder again.
    """

    def __init__(self, model: str, max_lora_rank: int = 16) -> None:
        self.model, self.max_lora_rank = model, max_lora_rank
        self.lora_requests: dict[str, LoRARequest] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._count = 0

    async def resolve_lora(self, lora_name: str) -> LoRARequest | None:
        registry = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry
        async with self._locks[lora_name]:
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
            self._count += 1
            number = self._count
            for name in registry.get_supported_resolvers():
                request: LoRARequest | None = await registry.get_resolver(name).resolve_lora(self.model, lora_name)
                if request is not None:
                    request.lora_int_id = number
                    self.load(request)
                    self.lora_requests[lora_name] = request
                    return request
        return None

    def load(self, request: LoRARequest) -> dict[str, Tensor]:
        """What vllm/lora/worker_manager.py does, at first and whenever a LoRA has left the memory."""
        config = json.loads(Path(request.lora_path, "adapter_config.json").read_text())
        if config["r"] > self.max_lora_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        return load_file(Path(request.lora_path, "adapter_model.safetensors"))
