"""YAML files whose fields are checked one by one: every complaint names its line, and all are gathered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import yaml

from hyperadapt.config.checks import shown

Keys: TypeAlias = tuple[str | int, ...]
# Takes the dotted name of a field and its value. Raises a TypeError or ValueError whose message begins with the name,
# or returns what to use in place of the value; None for the value itself.
Check: TypeAlias = Callable[[str, Any], Any]
_MAPPING, _SEQUENCE, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str"))


class Problem(NamedTuple):
    """What is wrong in a file, with the line, from 1."""

    line: int
    message: str


class YamlFile:
    """What a YAML file holds (None if it is no YAML), with the line of every field, and what is wrong with it so far.

    Python objects, aliases and duplicate keys are refused: they could run code, take any amount of memory, or be
    dropped silently. Numbers such as 5e-3, which PyYAML takes for text, are numbers.
    """

    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self._lines: dict[Keys, int] = {(): 1}
        self.data: Any = None
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
            value = None if node is None else self._value(node, ())
            self.data = {} if value is None else value
        except RecursionError:
            self.problems.append(Problem(1, "The file is nested too deeply. Write it flat."))
        except yaml.YAMLError as error:
            self.problems.append(_syntax_problem(error, text))

    def refuse(self, keys: Keys, message: str) -> None:
        """Add a problem with a field; where it is not in the file, the line of what would hold it counts."""
        while keys not in self._lines:
            keys = keys[:-1]
        self.problems.append(Problem(self._lines[keys], message))

    def _value(self, node: yaml.Node, keys: Keys) -> Any:
        self._lines.setdefault(keys, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (_MAPPING, _SEQUENCE):
            self.refuse(keys, f"{dotted(keys)} has the tag {shown(node.tag)}. Remove it: only plain values are read.")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(entry, (*keys, index)) for index, entry in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or error
            self.refuse(keys, f"{dotted(keys)}={shown(node.value)} cannot be read ({reason}). Put text in quotes.")
            return None

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, name = key_node.start_mark.line + 1, key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(line, f"{dotted(keys) or 'The file'} has a key that is no name."))
                continue
            place = (*keys, name)
            if key_node.tag != _TEXT:
                remedy = f"YAML takes the name for a {key_node.tag.rpartition(':')[2]}. Put it in quotes: '{name}'."
                self.problems.append(Problem(line, f"{dotted(place)}: {remedy}"))
            if name in values:
                remedy = f"first in line {self._lines[place]}. Keep one of the two."
                self.problems.append(Problem(line, f"{dotted(place)} is given twice, {remedy}"))
                continue
            self._lines[place] = line
            values[name] = self._value(value_node, place)
        return values


def dotted(keys: Keys) -> str:
    """The name of a field, as in ``adapter.r``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def check_text(name: str, value: Any) -> None:
    """Check for a text that is not empty."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a text, not {type(value).__name__}. Put it in quotes.")
    if not value.strip():
        raise ValueError(f"{name}={shown(value)} is empty. Write something, or leave the field out.")


def checked_texts(name: str, value: Any) -> tuple[str, ...]:
    """The texts of a list that is not empty; one text counts as a list."""
    if not isinstance(value, list):
        check_text(name, value)
        return (value,)
    if not value:
        raise ValueError(f"{name}=[] is empty. Write something, or leave the field out.")
    for index, entry in enumerate(value):
        check_text(f"{name}[{index}]", entry)
    return tuple(value)


class _Loader(yaml.SafeLoader):
    """Without aliases, and with numbers as YAML 1.2 and JSON write them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            message = f"*{event.anchor} refers to a value elsewhere. Write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number, and writes no aliases, which it refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Write dicts, lists and scalars as text that ``YamlFile`` reads as the same."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _syntax_problem(error: yaml.YAMLError, text: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(line, f"The character {chr(error.character)!r} is not allowed in YAML. Remove it.")
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    context = f"{error.context}, " if error.context else ""
    return Problem(1 if mark is None else mark.line + 1, f"This is no valid YAML: {context}{error.problem}.")
