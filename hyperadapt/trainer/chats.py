"""Chats as prompts with completions."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from hyperadapt.config.checks import shown


def split_chats(dataset: Dataset, column: str = "messages") -> Dataset:
    """Split chats into what is learned, the last message, and what it answers.

    Args:
        dataset: Rows with a list of messages, each with ``role`` and ``content``, of which the assistant's is the last.
        column: The column with the list.

    Returns:
        The rows with the columns ``prompt`` and ``completion`` in its place, both lists of messages.

    Raises:
        TypeError: If it is no `datasets.Dataset`.
        ValueError: If the column is missing, or a row is no such chat.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, but must be a datasets.Dataset. Split each split of a DatasetDict."
        )
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {column!r}, only {dataset.column_names}. Name the one with chats."
        )

    def split(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, completion = split_chat(f"Row {index}", row[column])
        return {"prompt": prompt, "completion": completion}

    return dataset.map(split, with_indices=True, remove_columns=column)


def split_chat(place: str, messages: Any) -> tuple[list[Any], list[Any]]:
    """Messages before the last one, and the last one, which must be the assistant's; `place` is for errors."""
    if not is_chat(messages):
        raise ValueError(
            f"{place} has the messages {shown(messages)}, but needs a list of them, each with 'role' and 'content'."
        )
    last = messages[-1]["role"]
    if last != "assistant":
        raise ValueError(
            f"{place} ends with a message of the role {last!r}, but what is learned is the assistant's last one. Drop "
            "what follows it, or the row."
        )
    if len(messages) == 1:
        raise ValueError(
            f"{place} has nothing before the assistant's message, so there is no prompt. Begin with the user's."
        )
    return messages[:-1], messages[-1:]


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with its role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in value
        )
    )
