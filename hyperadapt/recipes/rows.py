"""From rows of text to tokens: the data of a recipe's tasks as the model reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import Columns, read_columns
from hyperadapt.recipes.recipe import Recipe, TaskRecipe
from hyperadapt.trainer.losses import IGNORED


@dataclass(frozen=True)
class TaskRows:
    """The rows of one split of a task, checked.

    Args:
        place: The task and the file, for messages.
        texts: Of each row its texts: one or two to classify; or prompt and completion, which may be lists of messages.
        labels: Of each row the name of its label; empty for a language model.
        names: The labels that the task has, in order; empty for a language model.
    """

    place: str
    texts: Sequence[tuple[Any, ...]]
    labels: Sequence[str]
    names: tuple[str, ...]

    def select(self, rows: Sequence[int]) -> TaskRows:
        """Some of the rows.

        Args:
            rows: Their numbers, from 0.

        Returns:
            The rows, of a task with the same labels.
        """
        labels = [self.labels[row] for row in rows] if self.labels else []
        return TaskRows(self.place, [self.texts[row] for row in rows], labels, self.names)


def read_rows(recipe: Recipe, name: str, split: str) -> TaskRows:  # noqa: DOC502
    """Read one split of a task.

    Args:
        recipe: The recipe.
        name: The task.
        split: A split that it has.

    Returns:
        Its rows, at most ``max_rows`` of them. Labels are known by the recipe, by the data set, or else in the order in
        which the file shows them.

    Raises:
        ValueError: If the data cannot be read or is wrong; the message names task, file, row and column.
    """
    task = recipe.tasks[name]
    rows = checked_rows(read_columns(task, name, split, data_columns(task, recipe.task_type)), task, recipe.task_type)
    return drawn(rows, recipe.max_rows.get(split))


def drawn(rows: TaskRows, max_rows: int | None) -> TaskRows:
    """Draw rows at random, the same ones every time; files are often sorted by label.

    Args:
        rows: The rows.
        max_rows: How many at most; None for all.

    Returns:
        The rows, in their order.
    """
    if max_rows is None or max_rows >= len(rows.texts):
        return rows
    chosen = np.random.default_rng(0).choice(len(rows.texts), max_rows, replace=False)
    return rows.select(sorted(chosen.tolist()))


def data_columns(task: TaskRecipe, task_type: str) -> list[str]:
    """The columns that a task's data needs.

    Args:
        task: The task.
        task_type: ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.

    Returns:
        Their names; for classification the label's is the last.
    """
    if task_type == "CAUSAL_LM":
        return [task.prompt, task.completion]
    return [column for column in (task.text, task.text_pair, task.label) if column is not None]


def checked_rows(columns: Columns, task: TaskRecipe, task_type: str) -> TaskRows:  # noqa: DOC502
    """Check texts and labels.

    Args:
        columns: The task's columns.
        task: The task.
        task_type: ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.

    Returns:
        The rows.

    Raises:
        ValueError: If a text or a label is wrong; the message names task, file, row and column.
    """
    *text_columns, last = data_columns(task, task_type)
    if task_type == "CAUSAL_LM":
        dialogues = list(zip(columns.values[task.prompt], columns.values[last], strict=True))
        for row, (prompt, completion) in enumerate(dialogues, 1):
            _check_dialogue(f"{columns.place}, row {row}", prompt, completion)
        return TaskRows(columns.place, dialogues, [], ())
    for column in text_columns:
        for row, text in enumerate(columns.values[column], 1):
            if not isinstance(text, str):
                raise ValueError(
                    f"{columns.place}, row {row} has {shown(text)} ({type(text).__name__}) in column {column!r}, but "
                    "needs a text."
                )
    texts = list(zip(*(columns.values[column] for column in text_columns), strict=True))
    labels = _label_names(columns, last, task.labels)
    names = task.labels or tuple(columns.names.get(last, ())) or tuple(dict.fromkeys(labels))
    return TaskRows(columns.place, texts, labels, names)


def tokenized(  # noqa: DOC502
    rows: TaskRows, tokenizer: PreTrainedTokenizerBase, *, task_type: str, labels: Sequence[str], max_length: int
) -> Dataset:
    """Tokenise rows.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        task_type: ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.
        labels: Names of the classifier's outputs.
        max_length: Tokens to keep of a row: texts lose their end, prompts their beginning.

    Returns:
        The tokenizer's columns and ``labels``: ids of classes; or for language models of tokens, -100 in the prompt.

    Raises:
        ValueError: If a completion is longer than `max_length`, or the tokenizer cannot make the prompts.
    """
    max_length = min(max_length, tokenizer.model_max_length)
    if task_type == "CAUSAL_LM":
        return Dataset.from_list(
            [
                _dialogue_tokens(f"{rows.place}, row {row}", prompt, completion, tokenizer, max_length)
                for row, (prompt, completion) in enumerate(rows.texts, 1)
            ]
        )
    columns = zip(*rows.texts, strict=True)
    encoded = dict(tokenizer(*map(list, columns), truncation=True, max_length=max_length))
    ids = {label: index for index, label in enumerate(labels)}
    return Dataset.from_dict({**encoded, "labels": [ids[label] for label in rows.labels]})


def collator(tokenizer: PreTrainedTokenizerBase, task_type: str) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """What makes padded batches of tokenised rows.

    Args:
        tokenizer: The tokenizer.
        task_type: ``"SEQ_CLS"`` or ``"CAUSAL_LM"``.

    Returns:
        A collator for ``Trainer``.
    """
    if task_type == "CAUSAL_LM":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def _label_names(columns: Columns, column: str, declared: Sequence[str] | None) -> list[str]:
    values = columns.values[column]
    if columns.is_text and not declared and all(re.fullmatch(r"-?\d+", value) for value in values):
        raise ValueError(f"{columns.place} has integers in column {column!r}. {_NAMELESS}")
    names = declared or columns.names.get(column)
    labels = []
    for row, value in enumerate(values, 1):
        place = f"{columns.place}, row {row}"
        if columns.is_text and value not in (names or [value]) and re.fullmatch(r"-?\d+", value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if names is None:
                raise ValueError(f"{place} has the integer {value} in column {column!r}. {_NAMELESS}")
            if not 0 <= value < len(names):
                raise ValueError(
                    f"{place} has {value} in column {column!r}, but there are names for 0 to {len(names) - 1} only. "
                    "Drop rows without a label, or name all labels."
                )
            value = names[value]
        elif not isinstance(value, str):
            raise ValueError(
                f"{place} has {shown(value)} ({type(value).__name__}) in column {column!r}, but a label is a name "
                "or an integer."
            )
        elif names is not None and value not in names:
            raise ValueError(
                f"{place} has {shown(value)} in column {column!r}, which is none of the task's labels: "
                f"{shown(list(names))}."
            )
        labels.append(value)
    return labels


_NAMELESS = "Give the labels' names in the recipe, from 0, such as 'labels: [negative, positive]'."


def _check_dialogue(place: str, prompt: Any, completion: Any) -> None:
    for name, value in (("prompt", prompt), ("completion", completion)):
        messages = value if isinstance(value, list) else []
        is_chat = bool(messages) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in messages
        )
        if not isinstance(value, str) and not is_chat:
            raise ValueError(
                f"{place} has the {name} {shown(value)}, but needs a text or a list of messages, each with 'role' "
                "and 'content'."
            )
    if isinstance(prompt, str) and not isinstance(completion, str):
        raise ValueError(f"{place} has a text as prompt, but messages as completion. Give both in the same form.")
    if not prompt or not completion:
        raise ValueError(f"{place} has an empty prompt or completion. Fill it in, or drop the row.")


def _dialogue_tokens(
    place: str, prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{place}: the tokenizer has no end-of-sequence token, so an answer would never end.")
    is_chat = not isinstance(prompt, str)
    if is_chat:
        prompt, completion = _chat_texts(place, prompt, completion, tokenizer)
    start = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    end = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not is_chat and start[-1:] == [tokenizer.eos_token_id]:
        start = start[:-1]
    if tokenizer.eos_token_id not in end:
        end = [*end, tokenizer.eos_token_id]
    if len(end) >= max_length:
        raise ValueError(
            f"{place} has a completion of {len(end)} tokens, which leaves no room for a prompt in max_length="
            f"{max_length}. Raise max_length, or drop the row."
        )
    surplus = len(start) + len(end) - max_length
    if surplus > 0:
        first = start[:1] if start[0] == tokenizer.bos_token_id else []
        start = first + start[surplus + len(first) :]
    return {
        "input_ids": start + end,
        "attention_mask": [1] * (len(start) + len(end)),
        "labels": [IGNORED] * len(start) + end,
    }


def _chat_texts(place: str, prompt: list[Any], completion: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        raise ValueError(f"{place} holds messages, but the tokenizer has no chat template. Give texts instead.")
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    start = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    whole = str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
    if not whole.startswith(start):
        raise ValueError(
            f"{place}: the tokenizer's chat template writes the prompt in another way when an answer follows, so that "
            "the answer cannot be told apart. Give texts instead of messages."
        )
    return start, whole[len(start) :]
