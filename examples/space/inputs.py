"""What visitors may give: texts, a description, a concept of the bank. A mistake is told in words that help."""

from __future__ import annotations

from collections.abc import Sequence

from examples.space.facts import Concept

MAX_TEXTS = 12
MAX_TEXT = 400
MAX_DESCRIPTION = 200


def checked_texts(texts: str) -> list[str]:
    """The lines that are not empty."""
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    if not lines:
        raise ValueError("There is no text. Type at least one, a line for each.")
    if len(lines) > MAX_TEXTS:
        raise ValueError(f"There are {len(lines)} texts. Give at most {MAX_TEXTS}, a line for each.")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_TEXT:
            raise ValueError(f"Text {number} has {len(line)} characters. Shorten it to at most {MAX_TEXT}.")
    return lines


def checked_description(description: str) -> str:
    """In one line."""
    words = " ".join(description.split())
    if not words:
        raise ValueError("There is no description. Say what shall be decided, such as “Is it about money?”.")
    if len(words) > MAX_DESCRIPTION:
        raise ValueError(f"The description has {len(words)} characters. Shorten it to at most {MAX_DESCRIPTION}.")
    if not any(letter.isalpha() for letter in words):
        raise ValueError(f"“{words}” has no word. Describe the task in words.")
    return words


def checked_concept(name: str | None, concepts: Sequence[Concept]) -> Concept:
    """The concept of that name."""
    if not name:
        raise ValueError("No task is chosen. Choose one from the list, or describe one.")
    found = [concept for concept in concepts if concept.name == name]
    if not found:
        raise ValueError(f"“{name}” is no task of the bank. Choose one from the list, or describe it.")
    return found[0]
