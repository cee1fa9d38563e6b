"""Encoding texts, each with its task."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hyperadapt.config.checks import shown
from hyperadapt.files import write_whole
from hyperadapt.sentence_transformers.tasks_in_force import AUTOMATIC, pinned_task, task_names_of
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.active import find_tuner, use_tasks


class TaskText(str):
    """A text that has its task with it, through sorting, batching and the queues of other processes."""

    task: str


def adopt(model: Any) -> None:
    """Let ``encode``, and what calls it, take tasks; and the card show how.

    Methods of this one model, since folders are loaded as a plain ``SentenceTransformer``. Partials, unlike closures,
    follow it through copy and pickle.
    """
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"A {type(model).__name__} has a hyperadapter, but only a SentenceTransformer hands tasks to it. Export "
            "the task that you want with export_sentence_transformer, and load that folder."
        )
    for method in (encode, _create_model_card):
        vars(model)[method.__name__] = functools.partial(method, model)
    for name in task_names_of(model):
        model.prompts.setdefault(name, "")
    model.model_card_data.add_tags("hyperadapter")


def encode(
    model: SentenceTransformer, *args: Any, tasks: str | Sequence[str] | Tensor | None = None, **kwargs: Any
) -> Any:
    """As ``SentenceTransformer.encode``, with a task for all texts or one for each; see ``docs/embeddings.md``."""
    function = type(model).encode
    if "sentences" in kwargs:
        # Its old name, until sentence-transformers drops it.
        kwargs["inputs"] = kwargs.pop("sentences")
    given = dict(inspect.signature(function).bind(model, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    tasks = _tasks_of_call(model, given) if tasks is None else tasks
    if given.get("task") not in AUTOMATIC:
        given.pop("task", None)
    if isinstance(tasks, str):
        given["tasks"] = tasks
    elif tasks is not None:
        given["inputs"] = _with_tasks(model, given["inputs"], tasks)
    return function(given.pop("self"), **given)


def _tasks_of_call(model: SentenceTransformer, given: Mapping[str, Any]) -> str | None:
    """The task of a call without ``tasks=``; None inside of ``use_tasks`` with an embedding."""
    names = task_names_of(model)
    task, prompt_name = given.get("task"), given.get("prompt_name")
    named = [task] if task not in (None, *AUTOMATIC) else []
    named += [prompt_name] if prompt_name in names and prompt_name not in AUTOMATIC else []
    if len(set(named)) > 1:
        raise ValueError(
            f"task={task!r} and prompt_name={prompt_name!r} are two tasks of this model. Pass one of them, or tasks= "
            "and the prompt as prompt=."
        )
    if named:
        chosen: str = named[0]
        # A task that was added later.
        model.prompts.setdefault(chosen, "")
        return chosen
    asked = find_tuner(model).router.asked
    if asked is not None:
        return _task_of_scope(asked.request.tasks, given)
    automatic = next((name for name in (task, prompt_name) if name in names), None)
    pinned = pinned_task(model)
    if automatic and pinned and automatic != pinned:
        raise ValueError(
            f"The call is for the task {automatic!r}, but {pinned!r} is pinned. Name the task with tasks=, or unpin "
            "with model.transformers_model.set_task(None)."
        )
    default = model.default_prompt_name if model.default_prompt_name in names else None
    found: str | None = automatic or pinned or default
    if found is None:
        raise ValueError(
            f"The model has the tasks {shown(names)}, and encode was not told which the texts are for. Pass tasks=, "
            "one name for all texts or a list of one for each, or call it inside of use_tasks(model, name). "
            "encode_query and encode_document ask for tasks called 'query' and 'document', and prompt_name may name "
            "one."
        )
    return found


def _task_of_scope(tasks: str | Sequence[str] | Tensor | None, given: Mapping[str, Any]) -> str | None:
    """The task of the innermost ``use_tasks``."""
    if isinstance(tasks, str):
        return tasks
    if tasks is not None:
        raise ValueError(
            f"use_tasks has a task for each of {len(tasks)} rows, but encode may be called several times inside of it. "
            "Pass the list to encode, as tasks=."
        )
    if given.get("pool") is not None or isinstance(given.get("device"), list):
        raise ValueError(
            "use_tasks has a task embedding, which does not reach the processes of a pool. Encode without pool= and "
            "with one device."
        )
    return None


def _with_tasks(model: SentenceTransformer, inputs: Any, tasks: Sequence[str] | Tensor) -> Any:
    """The inputs, each with its task."""
    names = task_names_of(model)
    ids = resolve_task_ids(tasks, names).tolist()
    is_one = model.is_singular_input(inputs)
    texts = [inputs] if is_one else inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    if len(ids) != len(texts):
        raise ValueError(
            f"Got tasks for {len(ids)} texts, but there are {len(texts)}. Pass one task per text, or one name for all."
        )
    carriers = []
    for text, task_id in zip(texts, ids, strict=True):
        if not isinstance(text, str):
            raise TypeError(
                f"A task for each input needs texts, but one is a {type(text).__name__}. Encode the inputs of each "
                "task in a call of their own, with one name as tasks=."
            )
        carrier = TaskText(text)
        carrier.task = names[task_id]
        carriers.append(carrier)
    return carriers[0] if is_one else carriers


def _create_model_card(model: SentenceTransformer, path: str, *args: Any, **kwargs: Any) -> None:
    """As sentence-transformers writes it, but what it shows to run names a task."""
    task = task_names_of(model)[0]
    with use_tasks(model, task):
        type(model)._create_model_card(model, path, *args, **kwargs)
    card = Path(path, "README.md")
    text = card.read_text(encoding="utf-8")
    imports = "from sentence_transformers import SentenceTransformer\n"
    if f"import hyperadapt\n{imports}" not in text:
        text = text.replace(imports, f"import hyperadapt\n{imports}", 1)
    for call in ("encode(sentences", "encode_query(queries", "encode_document(documents"):
        text = text.replace(f"model.{call})", f"model.{call}, tasks={json.dumps(task)})")
    write_whole(card, text)
