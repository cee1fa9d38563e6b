"""The tasks of a configuration, their descriptions, and where the embedding of each comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hyperadapt.config.checks import check_integer, check_type, checked_names, shown

# Those with a vector of their own that training learns, with text, and with examples.
LEARNED, TEXT, EXAMPLES = ("learned", "both"), ("text", "both", "text+examples"), ("examples", "text+examples")
SOURCES = ("learned", "text", "both", "examples", "text+examples")
# Of the task types, those whose rows are pairs of a prompt and a completion; those without a name classify.
PAIRS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# Before the name of a text encoder that is no model but a function.
FUNCTION = "function:"


def checked_tasks(tasks: Any, descriptions: Any, default: Any) -> tuple[list[str], dict[str, str | list[str]] | None]:
    """Names and descriptions of the tasks, as new objects; `tasks` may be a dict that gives both."""
    if isinstance(tasks, dict):
        if descriptions is not None:
            raise ValueError(
                f"tasks={shown(tasks)} already gives descriptions, and so does task_descriptions. Pass one of the two."
            )
        # A list keeps its order in JSON; PEFT saves dicts sorted by key, which would renumber the tasks.
        tasks, descriptions = list(tasks), tasks
    if not isinstance(tasks, list | tuple):
        raise TypeError(
            f"tasks={shown(tasks)} must be a list of names or a dict from name to description, not "
            f"{type(tasks).__name__}."
        )
    names = list(tasks)
    if not names:
        raise ValueError("tasks=[] names no task. Name at least one, or leave the field out for one task 'default'.")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"tasks={shown(names)} holds {shown(name)}; every task needs a non-empty name.")
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(f"tasks={shown(names)} names {shown(duplicates)} more than once; task names must be unique.")
    if descriptions is not None:
        _check_task_descriptions(descriptions, names)
        # The caller may change its lists.
        descriptions = {name: one if isinstance(one, str) else list(one) for name, one in descriptions.items()}
    if default is not None and default not in names:
        raise ValueError(f"default_task={shown(default)} is not among the tasks {shown(names)}. Name one of them.")
    return names, descriptions


def _check_task_descriptions(descriptions: Any, names: list[str]) -> None:
    if not isinstance(descriptions, dict):
        raise TypeError(
            f"task_descriptions={shown(descriptions)} must be a dict from task name to description, not "
            f"{type(descriptions).__name__}."
        )
    known = set(names)
    for name, description in descriptions.items():
        if name not in known:
            raise ValueError(
                f"task_descriptions describes {shown(name)}, which is not among the tasks {shown(names)}. Add it to "
                "tasks, or drop its description."
            )
        check_description(name, description)


def check_description(name: str, description: Any) -> None:
    """Check the description of a task: a text, or a list of texts that each describe it."""
    texts = description if isinstance(description, list | tuple) else [description]
    for text in texts or [description]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"The description of task {shown(name)} is {shown(description)}; write a non-empty text, or a list of "
                "them."
            )


def descriptions_of(task_descriptions: Mapping[str, str | list[str]] | None, task: str) -> list[str]:
    """The descriptions of a task; empty if there is none."""
    description = (task_descriptions or {}).get(task, [])
    return [description] if isinstance(description, str) else list(description)


def checked_sources(
    task_embedding: Any, tasks: Sequence[str], task_descriptions: Mapping[str, str | list[str]] | None
) -> str | dict[str, str]:
    """Where the embedding of each task comes from: one of ``SOURCES`` if all tasks share it, or a dict."""
    if not isinstance(task_embedding, str | dict):
        raise TypeError(
            f"task_embedding={shown(task_embedding)} must be one of {SOURCES}, or a dict from task name to one of "
            f"them, not {type(task_embedding).__name__}."
        )
    known, described = set(tasks), task_descriptions or {}
    sources = dict.fromkeys(tasks, task_embedding) if isinstance(task_embedding, str) else dict(task_embedding)
    for name, source in sources.items():
        if source not in SOURCES:
            raise ValueError(
                f"task_embedding={shown(source)} is unknown. Choose one of {', '.join(map(repr, SOURCES))}."
            )
        if name not in known:
            raise ValueError(f"task_embedding names {shown(name)}, which is not among the tasks {shown(list(tasks))}.")
    for name in tasks:
        if name not in sources:
            raise ValueError(
                f"task_embedding={shown(task_embedding)} gives no source for task {shown(name)}. Give every task one "
                f"of {', '.join(map(repr, SOURCES))}."
            )
        if sources[name] in TEXT and name not in described:
            raise ValueError(
                f"task_embedding={sources[name]!r} needs a description of task {shown(name)}. Pass tasks as a dict "
                "from name to description, or give the task task_embedding='learned'."
            )
    return sources[tasks[0]] if len(set(sources.values())) == 1 else sources


def checked_own_factors(own_factors: Any, tasks: Sequence[str]) -> list[str] | None:
    """The tasks with factors of their own, in the order of the tasks; None if there are none."""
    if own_factors is None:
        return None
    names, known = set(checked_names("own_factors", own_factors)), set(tasks)
    for name in own_factors:
        if name not in known:
            raise ValueError(
                f"own_factors names {shown(name)}, which is not among the tasks {shown(list(tasks))}. Leave it out."
            )
    return [name for name in tasks if name in names] or None


def check_text_fields(has_text: bool, text_encoder: Any, revision: Any, text_embedding_dim: Any) -> None:
    """Check the fields that say how descriptions become vectors, which some task must need."""
    if text_encoder is not None and not isinstance(text_encoder, str) and not callable(text_encoder):
        raise TypeError(
            f"text_encoder={shown(text_encoder)} must be the name or folder of a sentence-transformers model, or a "
            f"function from a list of texts to a tensor, not {type(text_encoder).__name__}."
        )
    check_type("text_encoder_revision", revision, str, "a string")
    if text_embedding_dim is not None:
        check_integer("text_embedding_dim", text_embedding_dim)
    if has_text:
        if text_encoder is None or text_encoder == "":
            raise ValueError(
                "task_embedding asks for text, but text_encoder is not given. Name a sentence-transformers model, or "
                "pass a function from a list of texts to a tensor of shape (texts, dim)."
            )
        return
    fields = {
        "text_encoder": text_encoder, "text_encoder_revision": revision, "text_embedding_dim": text_embedding_dim
    }  # fmt: skip
    for name, value in fields.items():
        if value is not None:
            raise ValueError(
                f"{name}={shown(value)} has no effect: no task's embedding takes text. Set task_embedding='text' or "
                "'both', or drop it."
            )


def check_compared_sizes(conditioning: str, text_embedding_dim: int | None, task_embedding_dim: int) -> None:
    """Check that vectors of descriptions can be embeddings as they are, where these are compared with activations."""
    if conditioning == "bilinear" and text_embedding_dim not in (None, task_embedding_dim):
        raise ValueError(
            f"conditioning='bilinear' compares activations of size task_embedding_dim={task_embedding_dim} with the "
            f"vectors of descriptions, which have size {text_embedding_dim}. Choose a text encoder of that size, best "
            "the base model itself, or conditioning='gated'."
        )


def check_example_fields(has_examples: bool, task_type: str | None, example_dim: Any, example_classes: Any) -> None:
    """Check the fields that say how examples become vectors, which some task must need."""
    for name, value in {"example_dim": example_dim, "example_classes": example_classes}.items():
        if value is None:
            continue
        check_integer(name, value)
        if not has_examples:
            raise ValueError(
                f"{name}={value} has no effect: no task's embedding takes examples. Set task_embedding='examples', or "
                "drop it."
            )
    if not has_examples:
        return
    if task_type not in (None, "SEQ_CLS", *PAIRS):
        raise ValueError(
            f"task_embedding asks for examples, which task_type={task_type!r} cannot have: they are rows with one "
            "class each (task_type 'SEQ_CLS' or None), or pairs of prompt and completion ('CAUSAL_LM', "
            "'SEQ_2_SEQ_LM'). Choose another task_embedding."
        )
    # Pairs have no classes.
    if example_dim is not None and (example_classes is None) != (task_type in PAIRS):
        raise ValueError(
            f"example_dim={example_dim} with example_classes={example_classes} does not fit task_type={task_type!r}. "
            "Leave both out: they are filled in when the adapter is made."
        )
    if example_dim is None and example_classes is not None:
        raise ValueError(f"example_classes={example_classes} is given without example_dim. Leave both out.")


def encoder_name(text_encoder: object) -> str | None:
    """How a text encoder is called in files: a name as it is, a function as ``function:<module>.<name>``."""
    if text_encoder is None or isinstance(text_encoder, str):
        return text_encoder
    kind = text_encoder if hasattr(text_encoder, "__qualname__") else type(text_encoder)
    return f"{FUNCTION}{kind.__module__}.{kind.__qualname__}"
