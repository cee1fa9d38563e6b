"""The model card of a LoRA that was exported from a hyperadapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hyperadapt.cards.card import CARD, MARKER, PIPELINES, template
from hyperadapt.cards.sections import plain
from hyperadapt.cards.snippets import base_model_of, lora_usage
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.files import write_whole


def write_lora_card(
    config: HyperAdapterConfig,
    task: str | None,
    description: str | Sequence[str] | None,
    directory: str | os.PathLike[str],
    *,
    format: str = "peft",
    address: str | None = None,
) -> None:
    """Write the card of an exported LoRA, README.md, which says how to use it without this package.

    `task` is None for a LoRA that a description alone asked for, `address` where it is loaded from other than
    `directory`.
    """
    base = base_model_of(config)
    title = f"LoRA for {base.name}: {plain(task) if task else 'from a description'}"
    texts = [description] if isinstance(description, str) else list(description or ())
    kinds = {"mlx": "mlx", "diffusers": "diffusers"}
    data = ModelCardData(
        base_model=base.hub_id,
        base_model_relation="adapter" if base.hub_id else None,
        library_name=kinds.get(format, "peft"),
        pipeline_tag=PIPELINES.get(config.task_type or ""),
        tags=["hyperadapt", "lora"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template("lora_template.md")),
        marker=MARKER,
        title=title,
        summary=" ".join([f"A LoRA adapter for {base.link}.", *(plain(text) for text in texts)]),
        usage=lora_usage(config, base, address or str(directory), format),
        origin=(
            f"Exported from {'task `' + plain(task) + '` of ' if task else ''}a hyperadapter, a hypernetwork that "
            "generates LoRA adapters, with hyperadapt "
            f"{metadata.version('hyperadapt')}. The export is exact, and needs no package beside the usual ones."
        ),
    )
    write_whole(Path(directory, CARD), str(card))
