"""Folders of ordinary LoRAs with random updates, as PEFT saves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.support.helpers import base_model


def lora_folder(folder: Path, name: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """Save a LoRA whose updates are as large as the base weights; the same seed gives the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base_model(name), LoraConfig(**{"target_modules": "all-linear"} | config))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
    # Otherwise PEFT saves adapted embeddings along.
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
