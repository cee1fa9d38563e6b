"""Files of rows: what is read is what was written, and the kept ones are compact and complete."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.rows import append_row, read_rows, write_rows
from tests.support.docs_pages import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"arm": "a", "device": "cpu", "count": 1, "loss": float("inf"), "list": [1, {"x": None}]},
        {"arm": "b", "device": "cpu", "count": True, "loss": float("inf"), "list": [1, {"x": None}]},
        {"arm": "ß", "device": "cpu", "count": 1.0, "loss": float("inf"), "list": [1, {"x": None}], "more": None},
    ]
    for some in (rows, rows[:1], rows[1:], []):
        write_rows(tmp_path / "rows.jsonl", some)
        assert list(map(_sorted_text, read_rows(tmp_path / "rows.jsonl"))) == list(map(_sorted_text, some))
    write_rows(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[1] == '{"arm":"a","count":1}'


def test_appended_rows_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    for count in (1, 2):
        append_row(path, {"count": count})
        assert read_rows(path)[-1] == {"count": count}
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(path, {"count": float("nan")})
    assert len(read_rows(path)) == 2


def test_half_rows_do_not_count_and_give_way_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"name": "a"}, {"name": "ß"}]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    second = whole.splitlines(keepends=True)[1]
    for length in range(1, len(second)):
        path.write_bytes(whole[:-length])
        assert read_rows(path) == rows[:1]
        append_row(path, rows[1])
        assert path.read_bytes() == whole
    # A line that was complete and is none now is no half row.
    path.write_bytes(b"{}\n{\n{}\n")
    with pytest.raises(ValueError, match="Expecting property name"):
        read_rows(path)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json*")), ids=lambda path: path.stem)
def test_kept_rows_are_compact(path: Path, tmp_path: Path) -> None:
    rows = read_rows(path)
    assert all(row.keys() >= {"torch", "peft", "device", "date", "commit"} for row in rows)
    write_rows(tmp_path / "again.jsonl", rows)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_pictures_are_kept_for_the_pages_that_show_them() -> None:
    shown = {name for page in PAGES for name in re.findall(r"\(\S*results/(\w+\.\w+)\)", page.read_text("utf-8"))}
    assert {path.name for path in RESULTS.iterdir() if path.suffix not in (".jsonl", ".txt")} == shown


def _sorted_text(row: dict[str, Any]) -> str:
    return repr(sorted(row.items()))
