"""The model card of a LoRA that was exported from a hyperadapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import metadata

from huggingface_hub import ModelCardData
from jinja2 import Template

from hyperadapt.cards.card import MARKER, PIPELINES, template
from hyperadapt.cards.sections import code, label_list, plain
from hyperadapt.cards.snippets import base_model_of, lora_usage
from hyperadapt.config.config import HyperAdapterConfig


def lora_card(
    config: HyperAdapterConfig, task: str | None, descriptions: Sequence[str], address: str, format: str
) -> str:
    """The card of an exported LoRA, which says how to use it without this package.

    `task` is None for a LoRA that a description or examples asked for, `address` is the folder that it is loaded from.
    """
    base = base_model_of(config)
    made_from = "a description" if descriptions else "examples"
    title = f"LoRA for {base.name}: {plain(task) if task else f'from {made_from}'}"
    names = list(config.labels_of(task).values()) if task else []
    labels = [f"Its labels: {label_list(names)}."] if names else []
    libraries = {"mlx": "mlx", "diffusers": "diffusers"}
    # Not ModelCard.from_template, which reads and parses everything anew for each card: there may be thousands.
    card: str = _template().render(
        card_data=_metadata(base.hub_id, libraries.get(format, "peft"), PIPELINES.get(config.task_type or "")),
        marker=MARKER,
        title=title,
        summary=" ".join([f"A LoRA adapter for {base.link}.", *(plain(text) for text in descriptions), *labels]),
        usage=lora_usage(config, base, address, format),
        origin=(
            f"Exported from {f'task {code(task)} of ' if task else ''}a hyperadapter, a hypernetwork that "
            f"generates LoRA adapters, with hyperadapt {_version()}. The export is exact, and needs no package beside "
            "the usual ones."
        ),
    )
    return card


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
