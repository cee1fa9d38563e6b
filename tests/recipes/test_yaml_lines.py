"""YAML files with lines: numbers, duplicates, aliases, tags, broken syntax, and names that YAML takes for more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperadapt.recipes.yaml_lines import Problem, YamlFile, checked_texts, dotted, dump_yaml


def problems(text: str) -> list[tuple[int, str]]:
    return [(problem.line, problem.message) for problem in YamlFile(text).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-3", 5e-3),
        ("1E5", 1e5),
        ("-.5e+2", -50.0),
        ("2.5", 2.5),
        ("1_000", 1000),
        ("'5e-3'", "5e-3"),
        ("5e-3x", "5e-3x"),
        ("e5", "e5"),
        ("true", True),
        ("null", None),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    file = YamlFile(f"a: {text}")
    assert file.problems == []
    assert file.data == {"a": value}
    assert type(file.data["a"]) is type(value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "null"])
def test_an_empty_file_has_no_fields(text: str) -> None:
    file = YamlFile(text)
    assert file.data == {}
    assert file.problems == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "This is no valid YAML"),
        ("a:\n\tb: 1\n", 2, "found character '\\t' that cannot start any token"),
        ("a: 1\n\nb: c: d\n", 3, "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", 2, "but found another document"),
        ("a: &x 1\nb: *x\n", 2, "*x refers to a value elsewhere. Write the value out."),
        ("a: 1\nb: \x07\n", 2, "The character '\\x07' is not allowed in YAML."),
        ("a: " + "[" * 3000, 1, "nested too deeply"),
    ],
)
def test_broken_syntax_names_the_line(text: str, line: int, message: str) -> None:
    file = YamlFile(text)
    assert file.data is None
    [problem] = file.problems
    assert problem.line == line
    assert message in problem.message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is given twice, first in line 1. Keep one of the two."),
        ("s:\n  a: 1\n  a: 3\n", 3, "s.a is given twice, first in line 2. Keep one of the two."),
        ("s:\n  no: 1\n", 2, "s.no: YAML takes the name for a bool. Put it in quotes: 'no'."),
        ("s:\n  5: 1\n", 2, "s.5: YAML takes the name for a int. Put it in quotes: '5'."),
        ("s:\n  <<: {a: 1}\n", 2, "s.<<: YAML takes the name for a merge. Put it in quotes: '<<'."),
        ("s:\n  [1]: 1\n", 2, "s has a key that is no name."),
        ("? {a: 1}\n: 2\n", 1, "The file has a key that is no name."),
        ("a: !!python/object/apply:os.system ['ls']\n", 1, "a has the tag 'tag:yaml.org,2002:python/object/apply"),
        ("a: !!set {b: null}\n", 1, "a has the tag 'tag:yaml.org,2002:set'. Remove it"),
        ("a:\n- !!python/name:os.system x\n", 2, "a[0]='x' cannot be read (could not determine a constructor"),
        ("a: 2024-13-45\n", 1, "a='2024-13-45' cannot be read (month must be in 1..12). Put text in quotes."),
        ("a: " + "1" * 5000, 1, "cannot be read (Exceeds the limit"),
    ],
)
def test_values_that_are_refused(text: str, line: int, message: str) -> None:
    [(found_line, found)] = problems(text)
    assert found_line == line
    assert message in found


def test_a_problem_is_at_the_line_of_what_would_hold_the_field() -> None:
    file = YamlFile("a: 1\nb:\n  c:\n  - 1\n  - 2\n")
    file.refuse(("b", "missing", "deep"), "one")
    file.refuse(("b", "c", 1), "two")
    file.refuse(("missing",), "three")
    assert file.problems == [Problem(2, "one"), Problem(5, "two"), Problem(1, "three")]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (5, TypeError, "a=5 must be a text, not int"),
        (" ", ValueError, "a=' ' is empty"),
        ([], ValueError, r"a=\[\] is empty"),
        (["x", False], TypeError, r"a\[1\]=False must be a text, not bool"),
    ],
)
def test_texts_are_checked(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checked_texts("a", value)
    assert checked_texts("a", ["x", "y"]) == ("x", "y")
    assert checked_texts("a", "x") == ("x",)


def test_names_of_fields() -> None:
    assert dotted(("tasks", "a", 0, "b")) == "tasks.a[0].b"


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\x85"), min_size=1)
scalars = texts | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=5))
def test_what_is_written_reads_as_the_same(data: dict[str, Any]) -> None:
    file = YamlFile(dump_yaml(data))
    assert file.problems == []
    assert file.data == data


@pytest.mark.parametrize("text", ["no", "5e-3", "1e5", "null", "2024-01-01", "12:30", "*x", "<<", "a: b", "#", "'", ""])
def test_texts_that_look_like_more_stay_texts(text: str) -> None:
    file = YamlFile(dump_yaml({"a": text, "b": [text]} | ({text: 1} if text else {})))
    assert file.problems == []
    assert (file.data["a"], file.data["b"]) == (text, [text])


def test_what_two_fields_share_is_written_twice() -> None:
    shared = ["x", "y"]
    assert YamlFile(dump_yaml({"a": shared, "b": shared, "c": tuple(shared)})).data == dict.fromkeys("abc", shared)
