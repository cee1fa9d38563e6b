"""YAML files whose fields are checked one by one: every complaint names its line, and all are gathered."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from hyperadapt.config.checks import shown

Keys: TypeAlias = tuple[str | int, ...]
Check: TypeAlias = Callable[[str, Any], Any]


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong in a file.

    Args:
        line: Where, from 1.
        message: What.
    """

    line: int
    message: str


class YamlFields:
    """The content of a YAML file with the line of every field, and the problems found in it so far.

    Python objects, aliases and duplicate keys are refused: they could run code, take any amount of memory, or be
    dropped silently. Numbers such as 5e-3, which PyYAML takes for text, are numbers.

    Args:
        text: The file's text.

    Attributes:
        data: Dicts, lists, texts, numbers, booleans and None; None if the text is no YAML.
        problems: What is wrong.
    """

    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self.data: Any = None
        self._lines: dict[Keys, int] = {(): 1}
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
        """Add a problem.

        Args:
            keys: The field; where it is not in the file, the line of what would hold it counts.
            message: What is wrong, with the field's name.
        """
        while keys not in self._lines:
            keys = keys[:-1]
        self.problems.append(Problem(self._lines[keys], message))

    def require(self, *keys: str) -> None:
        """Add a problem if a field is missing or null, in a section that is there.

        Args:
            *keys: The field.
        """
        value = self._given(keys[:-1])
        if isinstance(value, dict) and value.get(keys[-1]) is None:
            self.refuse(keys, f"{dotted(keys)} is missing.")

    def section(
        self, keys: Keys, checks: Mapping[str, Check], owner: str, synonyms: Mapping[str, str]
    ) -> dict[str, Any]:
        """Check the fields of a section.

        Args:
            keys: The section.
            checks: Field -> check. It takes the dotted name and the value, and returns the value to use or raises a
                TypeError or ValueError whose message begins with the name.
            owner: Whose fields they are, for messages.
            synonyms: Name that is often written -> what to write.

        Returns:
            The fields that are given, not null and right.
        """
        value = self._given(keys)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(keys, f"{dotted(keys) or 'The file'} is {shown(value)}, but must hold lines of 'field: value'.")
            return {}
        checked = {}
        for name, entry in value.items():
            if name not in checks:
                message = f"{dotted((*keys, name))} is no field of {owner}."
                self.refuse((*keys, name), message + suggestion(name, checks, synonyms))
            elif entry is not None:
                try:
                    checked[name] = checks[name](dotted((*keys, name)), entry)
                except (TypeError, ValueError) as error:
                    self.refuse((*keys, name), str(error))
        return checked

    def _given(self, keys: Keys) -> Any:
        value = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _value(self, node: yaml.Node, keys: Keys) -> Any:
        self._lines.setdefault(keys, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and not node.tag.startswith(("tag:yaml.org,2002:map", _SEQUENCE)):
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
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(line, f"{dotted(keys) or 'The file'} has a key that is no name."))
                continue
            name = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                kind = key_node.tag.rpartition(":")[2]
                self.problems.append(
                    Problem(
                        line, f"{dotted((*keys, name))}: YAML takes the name for a {kind}. Put it in quotes: '{name}'."
                    )
                )
            if name in values:
                first = self._lines[(*keys, name)]
                self.problems.append(
                    Problem(
                        line, f"{dotted((*keys, name))} is given twice, first in line {first}. Keep one of the two."
                    )
                )
                continue
            self._lines[(*keys, name)] = line
            values[name] = self._value(value_node, (*keys, name))
        return values


def dotted(keys: Keys) -> str:
    """The name of a field, as in ``adapter.r``.

    Args:
        keys: The keys that lead to it.

    Returns:
        The name.
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def suggestion(name: str, known: Iterable[str], synonyms: Mapping[str, str]) -> str:
    """What may have been meant.

    Args:
        name: The unknown name.
        known: The known ones.
        synonyms: Name that is often written -> what to write.

    Returns:
        A question with a space before it, or nothing.
    """
    close = [synonyms[name]] if name in synonyms else difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_text(name: str, value: Any) -> str:
    """Check for a text.

    Args:
        name: The field.
        value: Its value.

    Returns:
        The text.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a text, not {type(value).__name__}. Put it in quotes.")
    if not value.strip():
        raise ValueError(f"{name}={shown(value)} is empty. Write something, or leave the field out.")
    return value


def check_texts(name: str, value: Any) -> tuple[str, ...]:  # noqa: DOC503
    """Check for a list of texts; one text counts as a list.

    Args:
        name: The field.
        value: Its value.

    Returns:
        The texts.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is no text, or an empty one.
    """
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}=[] is empty. Write something, or leave the field out.")
        return tuple(check_text(f"{name}[{index}]", entry) for index, entry in enumerate(value))
    return (check_text(name, value),)


_SEQUENCE = "tag:yaml.org,2002:seq"


class _Loader(yaml.SafeLoader):
    """Without aliases, and with numbers as YAML 1.2 and JSON write them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            message = f"*{event.anchor} refers to a value elsewhere. Write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Write what ``YamlFields`` reads as the same.

    Args:
        data: Dicts, lists, texts, numbers, booleans and None.

    Returns:
        The file's text.
    """
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
