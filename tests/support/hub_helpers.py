"""Models that are published on a local Hub and loaded from there."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import http_backoff
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.helpers import MIXED, TASK_TYPES, adapter_config, base_model, example_batch, logits, make_active
from tests.support.hub_server import HubServer

REPO = "user/adapter"
ATTRIBUTES = ".gitattributes"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
AUTO = {
    "llama": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "bert": (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
}


def make_model(hub: HubServer, folder: Path, name: str = "llama", seed: int = 2, **changes: Any) -> PeftModel:
    """An adapted model whose base model comes from the Hub."""
    repo_id = f"user/{name}"
    if repo_id not in hub.repos:
        base_model(name).save_pretrained(folder / name)
        hub.add_repo(repo_id, {path.name: path for path in (folder / name).iterdir()})
    base = AUTO[name][0].from_pretrained(repo_id)
    config = adapter_config(target_modules="all-linear", task_type=TASK_TYPES[name], **changes)
    return make_active(get_peft_model(base, config), seed)


def outputs(model: PeftModel, name: str = "llama") -> Tensor:
    return logits(model.eval(), example_batch(name, labels=False), tasks=MIXED)


def load(**options: Any) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/llama"), REPO, **options)


def published(hub: HubServer, repo_id: str = REPO, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.files(repo_id, revision).items() if path != ATTRIBUTES}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def skip_if_cut_is_not_repeated() -> None:
    """Older clients give up where a connection is cut, and wait otherwise than the Hub asks them to."""
    repeated = inspect.signature(http_backoff).parameters["retry_on_exceptions"].default
    if not any(error.__name__ == "RemoteProtocolError" for error in repeated):
        pytest.skip("this huggingface_hub does not repeat what was cut")
