"""Model cards: README.md of a hyperadapter and of a LoRA that was exported from one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from hyperadapt.cards.sections import (
    diagnosis_table,
    facts_list,
    normalization_text,
    python_number,
    saturation_text,
    task_table,
)
from hyperadapt.cards.snippets import Prompt, base_model_of, is_chat, usage
from hyperadapt.cards.trainer_state import last_results, trainer_state, training_facts
from hyperadapt.config.checks import check_type, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.diagnosis import Diagnosis
from hyperadapt.files import write_whole
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.saturation import Saturation
from hyperadapt.tuner.active import first_network

CARD = "README.md"
MARKER = "<!-- Written by hyperadapt, which may write it anew. Delete this line to keep your own words. -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_TAGS = ("hyperadapt", "hypernetwork", "multi-task", "peft")
_SHOWN_PROMPTS = 5
_LIMITS = (
    "The adapter works with its base model alone, and loading it needs `import hyperadapt`; a task that was exported "
    "with `hyperadapt.export_lora` does not.",
    "A task embedding selects behaviour that was trained. Tasks unlike the trained ones need examples, and may need "
    "training.",
)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beside what the adapter itself knows.

    Args:
        title: The heading; None for one made of the base model's name.
        repo_id: Name on the Hub, for the snippet; None for the folder that the card is written to.
        base_model: The base model's name on the Hub, where the model was loaded from a folder.
        usage: Python code that loads the adapter and runs it; None for code made of the base model's class.
        prompts: Task -> an input of its own, for the snippet and the widget: a text, several texts that belong
            together, or the messages of a chat.
        labels: Task -> the names of its labels.
        results: Task -> metric -> number, such as ``{"trec": {"accuracy": 0.9}}``.
        split: Split of the data that the results are for.
        datasets: Names on the Hub of the data sets.
        training: Fact -> value, in the order to show them; if empty, what a trainer of transformers left in the
            folder, as are the results.
        diagnosis: What ``diagnose`` says of the model.
        saturation: Which updates are at their bound; None for what the diagnosis says.
        figures: Title -> path of a picture, relative to the card.
        license: As the Hub spells it, such as ``"apache-2.0"``.
        language: ISO 639 code, or several.
        tags: Further tags.
        limits: Further sentences on what the adapter cannot do. Here, and of the tags, data sets and labels, a text
            alone is a list of one.
    """

    title: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    usage: str | None = None
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    split: str = "test"
    datasets: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    saturation: Saturation | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
    limits: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("prompts", "labels", "results", "training", "figures"):
            check_type(name, getattr(self, name), Mapping, "a mapping", optional=False)
        read = {
            **{name: _listed(getattr(self, name)) for name in ("datasets", "tags", "limits")},
            "labels": {task: _listed(names) for task, names in self.labels.items()},
            "results": {task: _numbers(task, metrics) for task, metrics in self.results.items()},
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _numbers(task: str, metrics: Any) -> dict[str, float]:
    """The results of a task, in numbers that can be written as YAML."""
    example = "Give each metric a number, such as {'accuracy': 0.9}."
    if not isinstance(metrics, Mapping):
        raise TypeError(f"results has {shown(metrics)} for task {task!r}, which is no mapping. {example}")
    numbers = {metric: python_number(value) for metric, value in metrics.items()}
    for metric, value in numbers.items():
        if not isinstance(value, int | float):
            raise TypeError(f"results has {metric}={shown(value)} for task {task!r}, which is no number. {example}")
    return numbers


def write_card(  # noqa: DOC502
    model: PeftModel | HyperAdapterNetwork, directory: str | os.PathLike[str], *, overwrite: bool = False, **facts: Any
) -> None:
    """Write the model card of the active adapter, README.md.

    A card that is there already keeps its text, and its metadata are only completed, unless `overwrite` is set.

    Args:
        model: A ``PeftModel`` with a hyperadapter, or the ``network`` of a ``LoraGenerator``.
        directory: The adapter's folder, which exists.
        overwrite: Whether to replace a card.
        **facts: See ``CardFacts``.

    Raises:
        TypeError: If a fact is unknown, or of another type.
        ValueError: If results are given for an unknown task.
    """
    write_whole(Path(directory, CARD), card_text(model, directory, overwrite=overwrite, **facts))


def card_text(
    model: PeftModel | HyperAdapterNetwork, directory: str | os.PathLike[str], *, overwrite: bool, **facts: Any
) -> str:
    """What ``write_card`` writes into a folder."""
    path, told = Path(directory, CARD), _with_state(CardFacts(**facts), Path(directory), first_network(model).config)
    if path.exists() and not overwrite:
        return str(_completed_card(model, path, told))
    return str(_new_card(model, told, str(directory)))


def _with_state(facts: CardFacts, directory: Path, config: HyperAdapterConfig) -> CardFacts:
    """The facts, where they tell of no training completed by what a trainer left in the folder."""
    if facts.training:
        return facts
    state = trainer_state(directory)
    results = last_results(state.get("log_history", ()), config.task_names)
    facts = replace(facts, training=training_facts(state))
    return facts if facts.results or not results else replace(facts, results=results, split="validation")


def _new_card(model: PeftModel | HyperAdapterNetwork, facts: CardFacts, address: str) -> ModelCard:
    """A new card; the adapter is loaded from `address` if the facts name no repository."""
    config = first_network(model).config
    for name in ("results", "prompts", "labels"):
        unknown = sorted(getattr(facts, name).keys() - set(config.tasks))
        if unknown:
            raise ValueError(
                f"{name} names {shown(unknown)}, which are no tasks of the adapter. Its tasks: "
                f"{shown(config.task_names)}."
            )
    base = base_model_of(config, facts.base_model)
    address = facts.repo_id or address
    title = facts.title or f"{len(config.tasks)} tasks for {base.name} in one hyperadapter"
    positions = len(first_network(model).positions)
    card: ModelCard = ModelCard.from_template(
        _card_data(model, facts, title),
        template_path=str(template("template.md")),
        title=title,
        summary=(
            f"One hypernetwork that generates LoRA adapters of rank {config.r} for {positions} modules of {base.link}, "
            f"one for each of {len(config.tasks)} tasks. Made with hyperadapt, a method of PEFT."
        ),
        usage=f"```python\n{facts.usage.strip()}\n```" if facts.usage else usage(config, base, address, facts.prompts),
        tasks=task_table(config, facts.results, facts.labels),
        results_note=f"Measured on the {facts.split} split, one run." if facts.results else "",
        normalization=normalization_text(config),
        saturation=saturation_text(facts.saturation or getattr(facts.diagnosis, "saturation", None)),
        diagnosis=facts.diagnosis and diagnosis_table(facts.diagnosis),
        figures=list(facts.figures.items()),
        training=facts_list(facts.training) or "Not recorded.",
        limits=[*_LIMITS, *facts.limits],
        marker=MARKER,
        version=metadata.version("hyperadapt"),
    )
    return card


def _completed_card(model: PeftModel | HyperAdapterNetwork, path: Path, facts: CardFacts) -> ModelCard:
    """A card with its own text and the metadata that it lacks; tags are united, anything else that it says stays."""
    card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    new = _card_data(model, facts, facts.title or "hyperadapter")
    known = vars(card.data)
    for name, value in vars(new).items():
        if known.get(name) is None:
            known[name] = value
    known["tags"] = list(dict.fromkeys([*(known["tags"] or []), *(new.tags or [])]))
    return card


def may_be_written_anew(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder has no card, or one that says that it may be rewritten, so that nobody's words are lost."""
    path = Path(directory, CARD)
    return not path.exists() or MARKER.encode() in path.read_bytes()


def addressed(text: str, repo_id: str, subfolder: str | None = None) -> str:
    """A card whose code loads the adapter from the Hub, or first takes its files from there for a program."""
    part, files, chosen = "", "lora", ""
    if subfolder is not None:
        part, files, chosen = f", subfolder={json.dumps(subfolder)}", f"lora/{subfolder}", f" --include '{subfolder}/*'"
    text = re.sub(
        r'((?:PeftModel\.from_pretrained\(base_model, |load_lora_weights\())"(?:[^"\\]|\\.)*"(\)?)',
        lambda match: f"{match[1]}{json.dumps(repo_id)}{match[2] and part}{match[2]}",
        text,
    )
    # A card that was published elsewhere has such a line.
    download = rf"hf download {repo_id}{chosen} --local-dir lora\n"
    for command, changed in (
        (r"(mlx_lm\.generate --model .+ --adapter-path ).+( --prompt Hello)", rf"\1{files}\2"),
        (r"(python convert_lora_to_gguf\.py --base )(.+) \2", rf"\1{files} {files}"),
    ):
        text = re.sub(rf"^(?:hf download .+\n)?{command}$", download + changed, text, flags=re.MULTILINE)
    return text


def template(name: str) -> Path:
    """Path of a template of cards."""
    return Path(__file__).parent / "templates" / name


def _card_data(model: PeftModel | HyperAdapterNetwork, facts: CardFacts, title: str) -> ModelCardData:
    config = first_network(model).config
    base, pipeline = base_model_of(config, facts.base_model), PIPELINES.get(config.task_type or "")
    given = getattr(model.get_base_model(), "model_tags", None) or [] if isinstance(model, PeftModel) else []
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=task,
            dataset_name=task,
            dataset_split=facts.split,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for task, metrics in facts.results.items()
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        base_model=base.hub_id,
        base_model_relation="adapter" if base.hub_id else None,
        library_name="hyperadapt",
        pipeline_tag=pipeline,
        license=facts.license,
        language=facts.language if facts.language is None or isinstance(facts.language, str) else list(facts.language),
        datasets=list(facts.datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=list(dict.fromkeys([*_TAGS, *given, *facts.tags])),
        eval_results=results or None,
        **_widget(facts.prompts),
        model_name=title if results else None,
    )


def _widget(prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """Inputs to try on the Hub, of some tasks; empty if there are none."""
    entries = []
    for task, prompt in list(prompts.items())[:_SHOWN_PROMPTS]:
        if is_chat(prompt):
            entry: dict[str, Any] = {"messages": list(prompt)}
        else:
            texts = [prompt] if isinstance(prompt, str) else prompt
            entry = dict(zip(("text", "text_pair"), texts, strict=False))
        entries.append({**entry, "example_title": task})
    return {"widget": entries} if entries else {}
