"""The notebook: it runs, and what it shows is kept with it."""

from pathlib import Path
from typing import Any

import pytest

from examples.support.text_tasks import encoder_path
from tests.support.helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
TOUR = ROOT / "examples" / "tour.ipynb"
PICTURES = 300_000


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    shown = [one.text if one.output_type == "stream" else one.data["text/plain"] for one in outputs(notebook)]
    return "\n".join(shown)


def check(notebook: Any) -> None:
    """What has to be in the outputs however long it was trained, and what must not."""
    found = outputs(notebook)
    assert {one.output_type for one in found} <= {"stream", "display_data", "execute_result"}
    assert [one.text for one in found if one.get("name") == "stderr"] == []
    assert sum("image/png" in one.get("data", {}) for one in found) == 3
    text = printed(notebook)
    assert "the other tasks answer as before: True" in text
    assert "sms_spam True" in text
    assert "LoraConfig largest difference of logits: " in text
    assert "3 tasks at 36 positions" in text


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in {"TOUR_FAST": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)


def test_the_tour_keeps_what_it_shows() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    check(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    source = TOUR.read_text(encoding="utf-8")
    assert [folder for folder in ("/root", "/home", "/tmp", "/opt", "/Users", "\\\\Users") if folder in source] == []
    pictures = [one.data["image/png"] for one in outputs(notebook) if "image/png" in one.get("data", {})]
    assert sum(map(len, pictures)) < PICTURES


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_tour_is_named_where_one_starts(page: str) -> None:
    assert "examples/tour.ipynb" in (ROOT / page).read_text(encoding="utf-8")
