"""The model card of a LoRA that was exported from a hyperadapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Template

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
    libraries = {"mlx": "mlx", "diffusers": "diffusers"}
    # Not ModelCard.from_template, which reads and parses everything anew for each card: there may be thousands.
    card = _template().render(
        card_data=_metadata(base.hub_id, libraries.get(format, "peft"), PIPELINES.get(config.task_type or "")),
        marker=MARKER,
        title=title,
        summary=" ".join([f"A LoRA adapter for {base.link}.", *(plain(text) for text in texts)]),
        usage=lora_usage(config, base, address or str(directory), format),
        origin=(
            f"Exported from {'task `' + plain(task) + '` of ' if task else ''}a hyperadapter, a hypernetwork that "
            f"generates LoRA adapters, with hyperadapt {_version()}. The export is exact, and needs no package beside "
            "the usual ones."
        ),
    )
    write_whole(Path(directory, CARD), card)


@cache
def _template() -> Template:
    made: Template = Template(template("lora_template.md").read_text(encoding="utf-8"))
    return made


@cache
def _version() -> str:
    return metadata.version("hyperadapt")


@lru_cache
def _metadata(base_model: str | None, library: str, pipeline: str | None) -> str:
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["hyperadapt", "lora"],
    )
    return str(data.to_yaml())
