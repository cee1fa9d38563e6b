"""The labels of a classifier's tasks: which of its outputs are a task's own, and what they are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from hyperadapt.config.adapted_fields import AdaptedModel
from hyperadapt.config.checks import check_integer, shown

# Output -> label, by output; or, until the classifier is known, names that it may have.
Labels = dict[int, str] | list[str]
# Task types whose outputs are no classes.
_NO_CLASSES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")
_FORM = "Give a list of names, or a dict from output to name such as {0: 'spam', 1: 'genuine'}."


def checked_task_labels(task_labels: Any, tasks: Sequence[str], task_type: str | None) -> dict[str, Labels] | None:
    """The labels by task, as new objects, of outputs that are in order; None if there are none."""
    if task_labels is None:
        return None
    if not isinstance(task_labels, dict):
        raise TypeError(
            f"task_labels={shown(task_labels)} must be a dict from task name to labels, not "
            f"{type(task_labels).__name__}."
        )
    if task_type in _NO_CLASSES and task_labels:
        raise ValueError(
            f"task_labels={shown(task_labels)} are for classifiers, but task_type={task_type!r} has no classes. Leave "
            "them out, or set task_type='SEQ_CLS'."
        )
    for name in task_labels:
        if name not in tasks:
            raise ValueError(
                f"task_labels names {shown(name)}, which is not among the tasks {shown(list(tasks))}. Add it to tasks, "
                "or drop its labels."
            )
    return {name: checked_labels(name, task_labels[name]) for name in tasks if name in task_labels} or None


def checked_labels(task: str, labels: Any) -> Labels:
    """The labels of one task: names, all different, with or without the outputs that they stand for."""
    if not isinstance(labels, dict | list | tuple):
        raise TypeError(f"The labels of task {task!r} are {shown(labels)}, of type {type(labels).__name__}. {_FORM}")
    if not labels:
        raise ValueError(f"The labels of task {task!r} are empty. {_FORM}")
    names = list(labels.values()) if isinstance(labels, dict) else list(labels)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"Task {task!r} has the label {shown(name)} ({type(name).__name__}), but a label is a text. Write "
                f"{str(name)!r} if that is its name."
            )
        if not name.strip():
            raise ValueError(f"Task {task!r} has the label {name!r}, which is empty. Give every label a name.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"Task {task!r} has the labels {shown(twice)} more than once. Give every label a name of its own."
        )
    if not isinstance(labels, dict):
        return names
    by_output = {_output(task, key): name for key, name in labels.items()}
    if len(by_output) < len(labels):
        raise ValueError(f"The labels of task {task!r}, {shown(labels)}, name an output twice. Name each of them once.")
    return dict(sorted(by_output.items()))


def _output(task: str, key: Any) -> int:
    """The number of an output, which JSON can only hold as a text."""
    if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", key):
        return int(key)
    # NumPy has integers of its own.
    if isinstance(key, bool) or not isinstance(key, Integral):
        raise TypeError(
            f"Task {task!r} has a label for output {shown(key)} ({type(key).__name__}), but outputs are integers, from "
            "0, the classes of the training data."
        )
    if key < 0:
        raise ValueError(f"Task {task!r} has a label for output {key}, but outputs count from 0.")
    return int(key)


def of_outputs(task_labels: Mapping[str, Labels], base: AdaptedModel) -> dict[str, Labels]:
    """The labels by output of a classifier that is known, which has those outputs."""
    return {task: _of_outputs(task, labels, base) for task, labels in task_labels.items()}


def _of_outputs(task: str, labels: Labels, base: AdaptedModel) -> dict[int, str]:
    if isinstance(labels, list):
        labels = _found(task, labels, base)
    surplus = [output for output in labels if base.num_labels is not None and output >= base.num_labels]
    if surplus:
        raise ValueError(
            f"Task {task!r} has labels for the outputs {shown(surplus)}, but the classifier has {base.num_labels}, "
            f"from 0. Load the base model with num_labels={max(labels) + 1} or more, or correct the outputs."
        )
    return labels


def _found(task: str, names: list[str], base: AdaptedModel) -> dict[int, str]:
    """The outputs with these names, of a classifier that has names; else there is a name for each, in order."""
    known = own_names(base)
    if not known:
        if base.num_labels not in (None, len(names)):
            raise ValueError(
                f"Task {task!r} has {len(names)} labels, but the classifier has {base.num_labels} outputs, which have "
                f"no names. Say which outputs are the task's, as in {{0: {names[0]!r}}}, or load the base model with "
                "id2label."
            )
        return dict(enumerate(names))
    outputs = {name: output for output, name in known.items()}
    unknown = [name for name in names if name not in outputs]
    if unknown:
        raise ValueError(
            f"Task {task!r} has the labels {shown(unknown)}, but the classifier's outputs are called "
            f"{shown(list(outputs))}. Use those names, or say which output each label is, as in {{0: {unknown[0]!r}}}."
        )
    return dict(sorted((outputs[name], name) for name in names))


def own_names(base: AdaptedModel) -> dict[int, str]:
    """Output -> name in the base model's own configuration; empty where it has none but LABEL_0, LABEL_1, ..."""
    given = (base.config or {}).get("id2label")
    if not isinstance(given, dict) or base.num_labels is None:
        return {}
    named = ((output, given.get(str(output))) for output in range(min(base.num_labels, len(given) + 1)))
    names = {output: name for output, name in named if isinstance(name, str)}
    is_generic = all(name == f"LABEL_{output}" for output, name in names.items())
    return {} if len(names) < base.num_labels or is_generic else names


def all_names(base: AdaptedModel, task_labels: Mapping[str, Labels], task: str | None = None) -> dict[int, str]:
    """A name for each output of a classifier: a task's own, else the one that all tasks agree on, else the base's.

    What has no name, or one that another output has taken, is called LABEL_0, LABEL_1, ... by its number.
    """
    if base.num_labels is None:
        return {}
    check_integer("num_labels", base.num_labels)
    own = by_output(task_labels.get(task or ""))
    found: dict[int, set[str]] = {}
    for labels in task_labels.values():
        for output, name in by_output(labels).items():
            found.setdefault(output, set()).add(name)
    agreed = {output: next(iter(names)) for output, names in found.items() if len(names) == 1}
    known, taken = own_names(base), set(own.values())
    names: dict[int, str] = {}
    for output in range(base.num_labels):
        name = agreed.get(output, known.get(output, ""))
        if output in own:
            name = own[output]
        elif not name or name in taken:
            name = f"LABEL_{output}"
        names[output] = name
        taken.add(name)
    return names


def by_output(labels: Labels | None) -> dict[int, str]:
    """Output -> label; empty where there are none, or the classifier is not known yet."""
    return dict(labels) if isinstance(labels, dict) else {}
