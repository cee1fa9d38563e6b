"""What the columns of a data file are for, guessed from their names and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperadapt.config.checks import shown
from hyperadapt.recipes.columns import Columns
from hyperadapt.trainer.chats import is_chat

# Names of columns, the usual one first. Those of answers count only beside one of a prompt.
_TEXTS = ("text", "sentence", "content", "review", "message", "body", "document", "question", "title", "utterance")
_PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("text", "text_pair")),
    *(("question1", "question2"), ("question", "context"), ("question", "passage"), ("query", "passage")),
)
_LABELS = ("label", "labels", "category", "class", "intent", "sentiment", "topic", "target", "label_text")
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "source")
_ANSWERS = ("completion", "response", "answer", "output", "target", "reply")
_CHATS = ("messages", "conversation", "conversations", "chat")
_NAMES = {*_TEXTS, *_LABELS, *_PROMPTS, *_ANSWERS, *_CHATS, *(name for pair in _PAIRS for name in pair)}
_INTEGER = re.compile(r"-?\d+")
_MOST_LABELS = 1000
# Values that a file of few rows may have as labels, though they hardly come again.
_FEW = 8


@dataclass(frozen=True)
class Guess:
    """What the columns of a task's file are for."""

    # "SEQ_CLS" or "CAUSAL_LM", and the fields of the task in a recipe that differ from their defaults.
    task_type: str
    fields: Mapping[str, Any]
    # In words, for people.
    words: str
    # Of the longest row.
    letters: int
    is_chat: bool = False


def guess_columns(columns: Columns, task: str) -> Guess:
    """What the columns are for: prompts and completions, chats, or texts and labels."""
    kinds = {name: _kind(values) for name, values in columns.values.items()}
    texts = [name for name, kind in kinds.items() if kind == "text"]
    chats = [name for name, kind in kinds.items() if kind == "chat"]
    found = (
        _dialogues(columns, texts, chats, ("prompt",), ("completion",))
        or _whole_chats(columns, chats)
        or _labelled(columns, task, kinds, _named(_repeated(columns, kinds), _LABELS))
        or _dialogues(columns, texts, chats, _PROMPTS, _ANSWERS)
        or _labelled(columns, task, kinds, _named(_repeated(columns, kinds, _FEW), _LABELS))
    )
    if found is None:
        _check_labels(columns, kinds)
        found = _labelled(columns, task, kinds, _few_valued(columns, kinds))
    if found is None:
        _check_filled(columns, [name for name in kinds if name.lower() in _NAMES])
        _check_are_few(columns, kinds)
        raise ValueError(
            f"{columns.place} has the columns {shown(list(kinds))}, among which neither texts with labels, prompts "
            "with completions nor chats were found. Name the columns so (text and label, prompt and completion, or "
            "messages), or write the recipe yourself: its tasks can name columns."
        )
    return found


def _kind(values: Sequence[Any]) -> str:
    """What all values of a column are, in one word."""
    kinds: tuple[tuple[str, Callable[[Any], bool]], ...] = (
        ("text", lambda value: isinstance(value, str)),
        ("integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
        ("chat", is_chat),
    )
    return next((name for name, holds in kinds if values and all(map(holds, values))), "other")


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first column that has one of the names, whatever their case."""
    lower = {name.lower(): name for name in reversed(list(columns))}
    return next((lower[name] for name in names if name in lower), None)


def _few_valued(columns: Columns, kinds: Mapping[str, str]) -> str | None:
    """The column whose values come again most often, at least twice each; one value alone tells nothing."""
    counts = {name: len(set(columns.values[name])) for name in _repeated(columns, kinds)}
    return min((name for name, count in counts.items() if count > 1), key=counts.__getitem__, default=None)


def _repeated(columns: Columns, kinds: Mapping[str, str], few: int = 0) -> list[str]:
    """The columns whose values may be labels: each comes twice on average, or there are few, or they have names."""
    return [
        name
        for name, kind in kinds.items()
        if kind in ("text", "integer")
        and (len(set(values := columns.values[name])) <= max(len(values) // 2, few) or columns.names.get(name))
    ]


def _check_labels(columns: Columns, kinds: Mapping[str, str]) -> None:
    """Refuse a row that keeps a column of labels, by its name, from being one."""
    label = _named(kinds, _LABELS)
    if label is None or kinds[label] != "other":
        return
    _check_filled(columns, [label])
    values = columns.values[label]
    kind = "integer" if _kind(values[:1]) == "integer" else "text"
    row = next(row for row, value in enumerate(values) if _kind([value]) != kind)
    raise ValueError(
        f"{columns.place}, row {row + 1} has {shown(values[row])} ({type(values[row]).__name__}) in column {label!r}, "
        "but labels are names, or integers in every row. Write a name in its place, or drop the row."
    )


def _check_filled(columns: Columns, names: Iterable[str]) -> None:
    for name in names:
        if None in columns.values[name]:
            row = list(columns.values[name]).index(None) + 1
            raise ValueError(f"{columns.place}, row {row} has nothing in column {name!r}. Fill it in, or drop the row.")


def _check_are_few(columns: Columns, kinds: Mapping[str, str]) -> None:
    """Refuse values that differ from row to row in a column of labels, by its name."""
    label = _named(kinds, _LABELS)
    has_text = any(kind == "text" for name, kind in kinds.items() if name != label)
    if label is not None and has_text and kinds[label] in ("text", "integer"):
        values = columns.values[label]
        raise ValueError(
            f"{columns.place} has {len(set(values))} values in the {len(values)} rows of column {label!r}, which are "
            "too many for labels. If they are answers, name the columns prompt and completion; or write the recipe "
            "yourself: its tasks can name columns."
        )


def _dialogues(
    columns: Columns, texts: Sequence[str], chats: Sequence[str], prompts: Sequence[str], answers: Sequence[str]
) -> Guess | None:
    for names in (texts, chats):
        prompt, answer = _named(names, prompts), _named(names, answers)
        if prompt and answer and prompt != answer:
            words = f"{'messages' if names is chats else 'prompts'} in {prompt!r}, answers in {answer!r}"
            fields = _fields(prompt=prompt, completion=answer)
            return _made("CAUSAL_LM", columns, fields, words, [prompt, answer], names is chats)
    return None


def _whole_chats(columns: Columns, chats: Sequence[str]) -> Guess | None:
    name = _named(chats, (*_CHATS, *chats))
    if name is None:
        return None
    words = f"chats in {name!r}, whose last message is learned"
    return _made("CAUSAL_LM", columns, _fields(messages=name), words, [name], True)


def _labelled(columns: Columns, task: str, kinds: Mapping[str, str], label: str | None) -> Guess | None:
    others = [name for name, kind in kinds.items() if name != label and kind == "text"]
    if label is None or not others or kinds[label] not in ("text", "integer"):
        return None
    pairs = ([name for one in pair if (name := _named(others, [one]))] for pair in _PAIRS)
    longest = max(others, key=lambda name: sum(map(len, columns.values[name])))
    used = next((pair for pair in pairs if len(pair) > 1), None) or [_named(others, _TEXTS) or longest]
    names = _label_names(columns, task, label)
    fields = _fields(text=used[0], label=label) | ({"text_pair": used[1]} if len(used) > 1 else {})
    count = len(names or columns.names.get(label, ()) or set(columns.values[label]))
    kind = "pairs of texts" if len(used) > 1 else "texts"
    words = f"{kind} in {' and '.join(map(repr, used))}, {count} labels in {label!r}"
    if names:
        fields["labels"] = names
        words += ", which are integers: give them better names"
    return _made("SEQ_CLS", columns, fields, words, [*used, label], False)


def _label_names(columns: Columns, task: str, label: str) -> list[str]:
    """Names for integers that have none; empty for labels that have names."""
    values = columns.values[label]
    if columns.names.get(label) or not all(_INTEGER.fullmatch(str(value)) for value in values):
        return []
    if not columns.is_text and not all(isinstance(value, int) for value in values):
        return []
    numbers = list(map(int, values))
    if min(numbers) < 0 or max(numbers) >= _MOST_LABELS:
        raise ValueError(
            f"{columns.place} has integers from {min(numbers)} to {max(numbers)} in column {label!r}, but labels count "
            f"from 0, to {_MOST_LABELS - 1} at most. Write names in their place, or drop rows without a label."
        )
    return [f"{task} {number}" for number in range(max(numbers) + 1)]


def _fields(**columns: str) -> dict[str, Any]:
    """The columns that do not have their usual names, which are those of the fields."""
    return {field: name for field, name in columns.items() if name != field}


def _made(
    task_type: str, columns: Columns, fields: Mapping[str, Any], words: str, used: Sequence[str], has_chats: bool
) -> Guess:
    unused = [name for name in columns.values if name not in used]
    rest = f"; not used: {', '.join(map(repr, unused))}" if unused else ""
    rows = zip(*(columns.values[name] for name in used), strict=True)
    letters = max(sum(map(_letters, row)) for row in rows)
    return Guess(task_type, fields, f"{words}{rest}", letters, has_chats)


def _letters(value: Any) -> int:
    return sum(len(str(message["content"])) for message in value) if isinstance(value, list) else len(str(value))
