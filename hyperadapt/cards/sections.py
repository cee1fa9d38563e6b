"""The parts of a model card as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.diagnosis import Diagnosis
from hyperadapt.hypernetwork.saturation import REMEDY, Saturation

_SHOWN_TASKS, _SHOWN_LABELS = 100, 10


def task_table(
    config: HyperAdapterConfig, results: Mapping[str, Mapping[str, float]], labels: Mapping[str, Sequence[str]]
) -> str:
    """The tasks with descriptions, labels and results (task -> metric -> value), a table of at most 100 tasks.

    Labels are those of the configuration, or else the given ones.
    """
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    labels = {task: own for task in config.tasks if (own := list(config.labels_of(task).values()) or labels.get(task))}
    rows = [["task", "description", *(["labels"] if labels else []), *metrics]]
    for task in config.task_names[:_SHOWN_TASKS]:
        description = (config.task_descriptions or {}).get(task, "")
        text = description if isinstance(description, str) else description[0]
        values = results.get(task, {})
        names = [label_list(labels.get(task, ()))] if labels else []
        rows.append([code(task), plain(text), *names, *(_number(values.get(metric)) for metric in metrics)])
    rest = len(config.tasks) - _SHOWN_TASKS
    return f"{_table(rows)}\n\nand {rest} more tasks." if rest > 0 else _table(rows)


def label_list(labels: Sequence[str]) -> str:
    """The labels of a task, at most 10 of them."""
    rest = [f"and {len(labels) - _SHOWN_LABELS} more"] * (len(labels) > _SHOWN_LABELS)
    return ", ".join([*(code(label) for label in labels[:_SHOWN_LABELS]), *rest])


def normalization_text(config: HyperAdapterConfig) -> str:
    """How the updates are generated and normalised, a paragraph."""
    options = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in config.normalization_options.items()
    )
    bound = " Bounds are in units of the norm of each base weight." if "bound" in config.normalization_options else ""
    return (
        f"Every generated update ΔW = B·A is normalised as `{config.normalization}`"
        f"{f' ({options})' if options else ''}; conditioning `{config.conditioning}`, head `{config.head}`.{bound}"
    )


def diagnosis_table(diagnosis: Diagnosis) -> str:
    """How much the tasks' updates differ: a sentence, and a table of at most 100 tasks."""
    rows = [["task", "‖ΔW‖ / ‖W₀‖", "nearest task (cosine)"]]
    for index, task in enumerate(diagnosis.tasks[:_SHOWN_TASKS]):
        norm = f"{float(diagnosis.task_norms[index]):.3g}"
        rows.append([code(task), norm, plain(diagnosis.nearest(index))])
    share = "all updates are zero" if diagnosis.is_zero else f"{diagnosis.share:.1%} of the squared updates"
    return f"Share that depends on the task: {share}.\n\n{_table(rows)}"


def saturation_text(saturation: Saturation | None) -> str:
    """That most updates are at their bound, and what to do; empty if they are not."""
    return f"{saturation}. {REMEDY}" if saturation and saturation.is_high else ""


def facts_list(facts: Mapping[str, Any]) -> str:
    """Facts, name -> number, text, or a mapping of such, as a list with a line for each."""
    lines = [f"- {plain(name).replace('_', ' ')}: {plain(_value(value))}" for name, value in facts.items()]
    return "\n".join(lines)


def python_number(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def plain(text: str) -> str:
    """Text in one line that cannot break out of a table, nor be taken for Markdown or HTML."""
    return re.sub(r"([*\[])", r"\\\1", _cell(text)).replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code in one line that cannot break out of a table."""
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("`", "'").strip()


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    value = python_number(value)
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
