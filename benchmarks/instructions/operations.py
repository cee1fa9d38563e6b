"""What can be asked of a short text: families of operations, their arguments, and the phrases that describe them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

TEXT, WORD, LETTERS, VALUE, RECORD, DONE = "text", "word", "letters", "value", "record", "done"
"""Kinds: several words; one; a part of one; a number, yes or no; fields with names; what nothing more is asked of."""
SAME = "same"
"""In the place of the kind that an operation gives: the one that it takes."""
ANY = (TEXT, WORD, LETTERS, VALUE)

NUMBERS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1, "second to last": -2}
COUNTS = {"letter": 1, "word": 1, "two": 2, "three": 3, "two letters": 2, "three letters": 3, "four": 4, "five": 5}
QUESTIONS = ("what", "who", "how", "when", "where", "which", "why")
KEYS = (
    *("name", "year", "color", "team", "author", "country", "job", "food", "animal"),
    *("size", "month", "number", "city", "song", "price", "title"),
)
"""Of the fields of records."""
BRACKETS = {
    "double quotes": '""',
    "single quotes": "''",
    "round brackets": "()",
    "square brackets": "[]",
    "angle brackets": "<>",
    "stars": "**",
    "vertical bars": "||",
    "curly brackets": "{}",
    "underscores": "__",
    "slashes": "//",
}
SIGNS = {"hyphens": "-", "underscores": "_", "slashes": "/", "commas": ",", "plus signs": "+", "dots": "."}
ENDS = {
    "an exclamation mark": "!",
    "a question mark": "?",
    "a full stop": ".",
    "a colon": ":",
    "three dots": "...",
    "a semicolon": ";",
}
STARTS = {"a hash": "# ", "a hyphen": "- ", "a greater-than sign": "> ", "the number one": "1. ", "a star": "* "}


@dataclass(frozen=True, eq=False)
class Family:
    """Operations that differ in their argument.

    Attributes:
        name: Unique.
        phrases: With ``{0}`` in the place of what it is applied to and ``{1}`` in that of the argument.
        apply: From a text and the argument to the answer; None for a text that is not asked about.
        takes: Kinds of texts.
        gives: The answer's kind.
        arguments: By their names in phrases.
        held_out: Argument -> ``"validation"`` or ``"test"``, of those that are never trained.
        role: Other than ``"train"`` for a family of which nothing is trained.
    """

    name: str
    phrases: tuple[str, str]
    apply: Callable[[str, str], str | None]
    takes: tuple[str, ...]
    gives: str
    arguments: tuple[str, ...] = ("",)
    held_out: Mapping[str, str] = field(default_factory=dict)
    role: str = "train"


def word_after(text: str, key: str) -> str | None:
    """The word that follows another one, if that is there once and not at the end."""
    words = text.split()
    return words[words.index(key) + 1] if words[:-1].count(key) == words.count(key) == 1 else None


def longest(text: str, _: str) -> str | None:
    """The word with the most letters, if it is the only one."""
    last, *others = sorted(text.split(), key=len, reverse=True)
    return last if len(last) > len(others[0]) else None


def field_of(record: str, key: str) -> str | None:
    """The value of a record's field, if it has one of that name."""
    return dict(part.split(": ") for part in record.split("; ")).get(key)


def part(start: int | None, stop: int | None) -> Callable[[str, str], str]:
    """What takes a part of a text, of which an argument says how long it is."""

    def take(text: str, argument: str) -> str:
        bounds = slice(*(None if bound is None else bound * COUNTS[argument] for bound in (start, stop)))
        return text[bounds] if "letter" in argument else " ".join(text.split()[bounds])

    return take


def yes_no(predicate: Callable[[str, str], bool]) -> Callable[[str, str], str]:
    """What answers a question."""
    return lambda text, argument: "yes" if predicate(text, argument) else "no"


def between(text: str, name: str) -> str:
    """A text between two signs."""
    return BRACKETS[name][0] + text + BRACKETS[name][1]


FAMILIES = (
    Family(
        "word",
        ("the {1} word of {0}", "the {1} one among the words of {0}"),
        lambda text, number: text.split()[NUMBERS[number]],
        (TEXT,),
        WORD,
        tuple(NUMBERS),
        {"third": "test"},
    ),
    Family(
        "word after",
        ('the word after "{1}" in {0}', 'the word that follows "{1}" in {0}'),
        word_after,
        (TEXT,),
        WORD,
        ("the", "is", "a", "to", "of", "does", "in", "for"),
        {"in": "validation", "for": "test"},
    ),
    Family(
        "field",
        ("the {1} in {0}", "what {0} has as its {1}"),
        field_of,
        (RECORD,),
        WORD,
        KEYS,
        {"song": "validation", "city": "test", "price": "test", "title": "test"},
    ),
    Family(
        "longest word",
        ("the longest word of {0}", "the word of {0} with the most letters"),
        longest,
        (TEXT,),
        WORD,
        role="validation",
    ),
    Family(
        "first words",
        ("the first {1} words of {0}", "the {1} words that {0} begins with"),
        part(None, 1),
        (TEXT,),
        TEXT,
        ("two", "three"),
    ),
    Family(
        "last words",
        ("the last {1} words of {0}", "the {1} words that {0} ends with"),
        part(-1, None),
        (TEXT,),
        TEXT,
        ("two", "three"),
        {"three": "test"},
    ),
    Family(
        "without the first",
        ("{0} without its first {1}", "{0} with its first {1} left out"),
        part(1, None),
        (TEXT,),
        TEXT,
        ("word",),
    ),
    Family(
        "without the last",
        ("{0} without its last {1}", "{0} with its last {1} left out"),
        part(None, -1),
        (TEXT,),
        TEXT,
        ("word",),
        role="test",
    ),
    Family(
        "replaced",
        ('{0} with "{1}" in place of its first word', '{0}, its first word replaced by "{1}"'),
        lambda text, new: " ".join([new, *text.split()[1:]]),
        (TEXT,),
        TEXT,
        ("Now", "Then", "Maybe", "Perhaps"),
        {"Perhaps": "test"},
    ),
    Family(
        "reversed",
        ("{0} with its words in reverse order", "{0} with its words from last to first"),
        lambda text, _: " ".join(text.split()[::-1]),
        (TEXT,),
        TEXT,
    ),
    Family(
        "sorted",
        ("{0} with its words in alphabetical order", "{0} with its words sorted from A to Z"),
        lambda text, _: " ".join(sorted(text.split(), key=str.lower)),
        (TEXT,),
        TEXT,
    ),
    Family("twice", ("{0}, two times", "{0}, written twice"), lambda text, _: f"{text} {text}", (WORD,), DONE),
    Family(
        "first letters",
        ("the first {1} of {0}", "the {1} that {0} begins with"),
        part(None, 1),
        (WORD,),
        LETTERS,
        ("letter", "two letters", "three letters"),
    ),
    Family(
        "last letters",
        ("the last {1} of {0}", "the {1} that {0} ends with"),
        part(-1, None),
        (WORD,),
        LETTERS,
        ("letter", "two letters", "three letters"),
        {"two letters": "test"},
    ),
    Family(
        "initials",
        ("the first letters of all words of {0}", "the letters that the words of {0} begin with"),
        lambda text, _: "".join(word[0] for word in text.split()),
        (TEXT,),
        LETTERS,
        role="test",
    ),
    Family(
        "number of letters",
        ("the number of letters in {0}", "how many letters {0} has"),
        lambda text, _: str(len(text)),
        (WORD,),
        VALUE,
    ),
    Family(
        "number of words",
        ("the number of words in {0}", "how many words {0} has"),
        lambda text, _: str(len(text.split())),
        (TEXT,),
        VALUE,
    ),
    Family(
        "has a word",
        ('whether "{1}" is a word of {0}, yes or no', 'yes if {0} has the word "{1}", else no'),
        yes_no(lambda text, word: word in text.split()),
        (TEXT,),
        VALUE,
        ("the", "is", "a", "of", "to"),
        {"to": "test"},
    ),
    Family(
        "is longer",
        ("whether {0} has more than {1} words, yes or no", "yes if {0} has over {1} words, else no"),
        yes_no(lambda text, number: len(text.split()) > COUNTS[number]),
        (TEXT,),
        VALUE,
        ("four", "five"),
    ),
    Family(
        "is a question",
        ("whether {0} is a question, yes or no", "yes if {0} begins like a question, else no"),
        yes_no(lambda text, _: text.split()[0].lower() in QUESTIONS),
        (TEXT,),
        VALUE,
    ),
    Family(
        "capitals", ("{0} in capital letters", "{0} in upper case"), lambda text, _: text.upper(), (TEXT, WORD), SAME
    ),
    Family("small", ("{0} in small letters", "{0} in lower case"), lambda text, _: text.lower(), (TEXT, WORD), SAME),
    Family(
        "joined",
        ("{0} with {1} between its words", "the words of {0} joined by {1}"),
        lambda text, sign: SIGNS[sign].join(text.split()),
        (TEXT,),
        DONE,
        tuple(SIGNS),
        {"dots": "validation", "plus signs": "test"},
    ),
    Family(
        "between",
        ("{0} in {1}", "{0}, put between {1}"),
        between,
        ANY,
        DONE,
        tuple(BRACKETS),
        {"slashes": "validation", "curly brackets": "test", "underscores": "test"},
    ),
    Family(
        "ended",
        ("{0} with {1} at the end", "{0}, followed by {1}"),
        lambda text, sign: text + ENDS[sign],
        ANY,
        DONE,
        tuple(ENDS),
        {"a semicolon": "test"},
    ),
    Family(
        "begun",
        ("{0} with {1} at the start", "{0} after {1}"),
        lambda text, sign: STARTS[sign] + text,
        ANY,
        DONE,
        tuple(STARTS),
        {"a star": "test"},
    ),
    Family(
        "tag",
        ("{0} in the HTML tag {1}", "{0}, marked up with the tag {1} of HTML"),
        lambda text, name: f"<{name}>{text}</{name}>",
        ANY,
        DONE,
        ("b", "i", "p", "u", "td", "code", "em", "li"),
        {"em": "validation", "li": "test"},
    ),
    Family(
        "json",
        ('{0} as JSON with the key "{1}"', '{0}, as the value of "{1}" in JSON'),
        lambda text, key: json.dumps({key: text}),
        ANY,
        DONE,
        ("answer", "text", "word", "value", "result"),
        {"result": "test"},
    ),
    Family(
        "label",
        ('{0} after the label "{1}"', '{0}, labelled as "{1}"'),
        lambda text, name: f"{name}: {text}",
        ANY,
        DONE,
        ("Result", "Word", "Output", "Title", "Note"),
        {"Note": "test"},
    ),
    Family(
        "bold",
        ("{0} in bold in Markdown", "{0} between two pairs of stars"),
        lambda text, _: f"**{text}**",
        ANY,
        DONE,
        role="test",
    ),
    Family(
        "initial capitals",
        ("{0} with a capital letter at each word", "{0} with all its words capitalised"),
        lambda text, _: " ".join(word[0].upper() + word[1:].lower() for word in text.split()),
        (TEXT,),
        SAME,
        role="validation",
    ),
)
