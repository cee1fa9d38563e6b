"""The commands that answer rows, and measure answers."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest

from hyperadapt.runs import Record, train
from tests.support import tiny_runs
from tests.support.command_line import CommandLine


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for task_type in ("SEQ_CLS", "CAUSAL_LM"):
        folder = tmp_path_factory.mktemp(task_type)
        training = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"}
        found[task_type] = train(
            tiny_runs.recipe(folder, task_type, training=training), report=None, figures=False
        ).folder
    return found


@pytest.fixture
def adapter(trained: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained["SEQ_CLS"], trained["SEQ_CLS"].parent / tmp_path.name))


def said(text: str) -> str:
    """What a command complained of, without its frame."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_texts_and_files_are_answered(
    hyperadapt: CommandLine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("text,task,label\ngood,reviews,positive\nspam,mail,junk\n")
    (tmp_path / "rows.txt").write_text("bad\n\nham\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a\u2028b\r\n\n".encode())))
    found = hyperadapt.json("predict", adapter, "good day", tmp_path / "rows.txt", "-", "--task", "mail")["predictions"]
    assert [line["text"] for line in found] == ["good day", "bad", "ham", "a\u2028b"]
    assert all(set(line["scores"]) == {"mail", "junk"} for line in found)
    mixed = hyperadapt.json("predict", adapter, tmp_path / "rows.csv")["predictions"]
    assert [(line["task"], line["expected"]) for line in mixed] == [("reviews", "positive"), ("mail", "junk")]
    table = hyperadapt("predict", adapter, tmp_path / "rows.csv").splitlines()
    assert table[0].split() == ["row", "task", "score", "label", "text"]
    assert [line.split()[:2] for line in table[1:]] == [["1", "reviews"], ["2", "mail"]]
    assert hyperadapt("predict", adapter, "x" * 400 + " \x1b[2J", "--task", "mail").splitlines()[1].endswith("x…")


def test_answers_go_to_a_file_and_are_measured(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out.jsonl", adapter.parent / "data" / "mail" / "test.jsonl"
    told = hyperadapt.json("predict", adapter, data, "--task", "mail", "--output", out, "--batch-size", 3)
    assert told == {"output": str(out), "rows": 16}
    assert len(out.read_text().splitlines()) == 16
    measured = hyperadapt.json("evaluate", "--predictions", out)
    known = hyperadapt.json("evaluate", adapter, "--task", "mail")
    assert measured["tasks"]["mail"]["accuracy"] == known["tasks"]["mail"]["accuracy"]
    assert hyperadapt("evaluate", "--predictions", out).splitlines()[0] == "predictions"
    before = out.read_bytes()
    hyperadapt("predict", adapter, out, "--task", "mail", "--output", out, code=1)
    assert f"--output {out} is one of the files to answer, and would replace it." in hyperadapt.stderr
    assert out.read_bytes() == before
    hyperadapt("evaluate", adapter, "--predictions", out, "--limit", "2")
    assert len(out.read_text().splitlines()) == 6


def test_a_language_model_writes(hyperadapt: CommandLine, trained: dict[str, Path], tmp_path: Path) -> None:
    folder = trained["CAUSAL_LM"]
    [line] = hyperadapt.json("predict", folder, "a b", "--task", "mail", "--max-new-tokens", 2)["predictions"]
    assert (line["task"], line["prompt"]) == ("mail", "a b")
    assert len(line["completion"].split()) <= 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    table = hyperadapt("predict", folder, rows, "--task", "letters", "--max-new-tokens", 2).splitlines()
    assert table[0].split() == ["row", "prompt", "completion"]
    assert table[1].split()[:2] == ["1", "a"]
    hyperadapt("evaluate", folder, "--predictions", tmp_path / "out.jsonl", "--task", "mail")
    assert " - " in hyperadapt("evaluate", "--predictions", tmp_path / "out.jsonl").splitlines()[2] + " "


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["predict", "ADAPTER", "a"],
            1,
            "The text 'a' does not say which of the tasks ['reviews', 'letters', 'mail'] it",
        ),
        (["predict", "ADAPTER", "a", "--task", "new"], 1, "Unknown task 'new'."),
        (["predict", "ADAPTER", "rows.csv", "--task", "mail"], 1, "'rows.csv' is no file. Correct the path;"),
        (
            ["predict", "ADAPTER", " ", "--task", "mail"],
            2,
            "A text to answer is empty. Write something, or leave it out.",
        ),
        (
            ["predict", "ADAPTER", "a", "--output", "out.json"],
            2,
            "--output out.json gets a JSON object in each line, but",
        ),
        (["predict", "ADAPTER"], 2, "Missing argument"),
        (["evaluate"], 2, "Name the ADAPTER, or with --predictions a file of answers to measure."),
        (["evaluate", "--predictions", "a.jsonl", "--limit", "3"], 2, "--limit: name an ADAPTER; without one"),
        (["evaluate", "--predictions", "a.jsonl", "--split", "train"], 2, "--split: name an ADAPTER; without one"),
        (["evaluate", "--predictions", "none.jsonl"], 1, "'none.jsonl' is no file. Name one that predict --output or"),
    ],
)
def test_errors_are_told(
    hyperadapt: CommandLine, trained: dict[str, Path], arguments: list[str], code: int, message: str
) -> None:
    folder = trained["SEQ_CLS"]
    assert hyperadapt(*[folder if one == "ADAPTER" else one for one in arguments], code=code) == ""
    assert message in said(hyperadapt.stderr)


def test_results_are_kept_by_split(hyperadapt: CommandLine, adapter: Path) -> None:
    first = Record.load(adapter)
    assert (first.results["split"], first.other_results) == ("test", {})
    validated = hyperadapt.json("evaluate", adapter, "--split", "validation")
    record = Record.load(adapter)
    assert record.results == first.results
    assert record.other_results == {"validation": validated}
    for options in (["--task", "mail"], ["--limit", "3"], ["--split", "validation", "--limit", "3"]):
        output = hyperadapt("evaluate", adapter, *options)
        assert "not recorded, since the results lack " in output
        assert Record.load(adapter) == record
    tested = hyperadapt.json("evaluate", adapter, "--batch-size", "1")
    assert Record.load(adapter).results == tested
    assert Record.load(adapter).other_results == {"validation": validated}
    assert "Measured on the test split" in (adapter / "README.md").read_text()
