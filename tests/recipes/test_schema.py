"""The sections of a recipe."""

from hyperadapt.recipes.schema import Section
from hyperadapt.recipes.yaml_lines import Problem, YamlFile, check_text, checked_texts


def test_sections_check_their_fields() -> None:
    file = YamlFile("s:\n  a: x\n  b: null\n  cc: 3\n  rank: 1\n  d: 5\n  e: [x]\nt: [1]\n")
    checks = {"a": check_text, "b": check_text, "ccc": None, "d": check_text, "e": checked_texts}
    section = Section("a thing", checks, required=["a", "b", "f"], synonyms={"rank": "r"})
    assert section.checked(file, ("s",), file.data["s"]) == {"a": "x", "e": ("x",)}
    assert section.checked(file, ("t",), file.data["t"]) == section.checked(file, ("u",), None) == {}
    assert sorted(file.problems) == [
        Problem(1, "s.f is missing."),
        Problem(3, "s.b is missing."),
        Problem(4, "s.cc is no field of a thing. Did you mean 'ccc'?"),
        Problem(5, "s.rank is no field of a thing. Did you mean 'r'?"),
        Problem(6, "s.d=5 must be a text, not int. Put it in quotes."),
        Problem(8, "t is [1], but must hold lines of 'field: value'."),
    ]
