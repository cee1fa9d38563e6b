"""vLLM's LoRA resolver: requests for ``adapter/task`` get the task's LoRA, made when the first of them comes.

Only vLLM imports this module, as a plugin.
"""

from __future__ import annotations

import asyncio
import time

from vllm import envs
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from hyperadapt.config.checks import shown
from hyperadapt.serving.adapter import ServedAdapter
from hyperadapt.serving.cache import LoraCache
from hyperadapt.serving.settings import ADAPTERS, Settings

# vLLM shows what loggers below its own say.
logger = init_logger("vllm.hyperadapt")


def register() -> None:
    """Register the resolver with vLLM, if the environment names adapters; vLLM calls this in each of its processes."""
    settings = Settings.read()
    if settings is None:
        return
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        logger.warning("%s has no effect: vLLM resolves LoRAs only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.", ADAPTERS)
    LoRAResolverRegistry.register_resolver("hyperadapt", HyperadaptResolver(settings))


class HyperadaptResolver(LoRAResolver):  # type: ignore[misc]
    """Finds the adapter that a LoRA's name starts with, and answers with a folder of its cache."""

    def __init__(self, settings: Settings) -> None:
        cache = LoraCache(settings.cache_dir, settings.cache_bytes)
        adapters = [ServedAdapter(name, address, settings, cache) for name, address in settings.adapters.items()]
        # Of "user/a" and "user/a/b" the longer one is meant.
        self._adapters = sorted(adapters, key=lambda adapter: len(adapter.name), reverse=True)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The LoRA of a name; None for what is refused, with a line in the log, and for names of other resolvers."""
        for adapter in self._adapters:
            if lora_name.startswith(f"{adapter.name}/"):
                break
        else:
            return None
        started = time.monotonic()
        loop, name = asyncio.get_running_loop(), lora_name.removeprefix(f"{adapter.name}/")
        try:
            folder = await loop.run_in_executor(adapter.thread, adapter.folder, name, base_model_name)
        except ValueError as refusal:
            logger.warning("No LoRA for %s: %s", shown(lora_name), refusal)
            return None
        except Exception:
            logger.exception("No LoRA for %s, because of a failure:", shown(lora_name))
            return None
        logger.info("LoRA for %s: %s (%.2f s)", shown(lora_name), folder, time.monotonic() - started)
        # vLLM gives its own id; this one is as its workers need it, positive and of 32 bits.
        lora_int_id = int(folder.name[:8], 16) // 2 or 1
        return LoRARequest(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=str(folder))
