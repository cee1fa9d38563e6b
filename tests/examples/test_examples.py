"""An example is something that a person reads."""

from pathlib import Path

import pytest

from tests.support.helpers import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_named_where_one_starts(path: Path) -> None:
    limit = 60 if path.stem == "quickstart" else 80
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    assert f"-m examples.{path.stem}" in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
