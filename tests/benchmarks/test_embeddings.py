"""The embedding study runs what is missing, chooses by validation rows, and reports the others."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

from sentence_transformers import SentenceTransformer

from benchmarks.common.rows import Row, append_row, read_rows
from benchmarks.embeddings import __main__ as embeddings
from benchmarks.embeddings.__main__ import (
    CHOOSING_SEED,
    FROZEN,
    ONE,
    OURS,
    RATES,
    SEPARATE,
    Study,
    chosen_rate,
    missing,
)
from benchmarks.embeddings.base import TOKENS, base
from benchmarks.embeddings.report import report
from examples.support.embedding_texts import DATA
from examples.support.text_tasks import encoder_path
from tests.examples.test_embedding_tasks import corpora  # noqa: F401
from tests.support.helpers import minilm
from tests.support.tolerances import FLOAT32_FORWARD

# TrainingArguments of transformers 5.23 say so of a name that sentence-transformers 6.2 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def row_of(arm: str, rate: float, seed: int, split: str, score: float) -> Row:
    scores = {name: score + 0.01 * place for place, name in enumerate(DATA)}
    return {
        "arm": arm, "rate": rate, "seed": seed, "split": split, "scores": scores,
        "loss": None if arm == FROZEN else 2.0, "parameters": 608256, "train_cpu_seconds": 20.4, "cpu_seconds": 25.0,
    }  # fmt: skip


def all_rows(study: Study) -> list[Row]:
    rows: list[Row] = []
    while run := next(missing(rows, list(RATES), study), None):
        rows.append(row_of(**run, score={FROZEN: 0.5, ONE: 0.6, SEPARATE: 0.62, OURS: 0.7}[run["arm"]] + run["rate"]))
    return rows


def test_what_is_run_in_which_order() -> None:
    rows = all_rows(Study())
    choices = [(arm, rate, CHOOSING_SEED) for arm in (ONE, SEPARATE, OURS) for rate in RATES[arm]]
    assert [(row["arm"], row["rate"], row["seed"]) for row in rows[: len(choices)]] == choices
    # The best on validation rows was the highest rate.
    tests = rows[len(choices) :]
    assert {(row["arm"], row["rate"]) for row in tests} == {(arm, max(RATES[arm])) for arm in RATES}
    assert [row["arm"] for row in tests].count(FROZEN) == 1
    assert len(tests) == 1 + 3 * 3
    assert chosen_rate(rows, OURS) == 8e-3


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    report(all_rows(Study()))
    out = capsys.readouterr().out
    assert "mean and 95% interval over 3 seeds" in out
    assert "| frozen | 0.500 | 0.510 | 0.520 | 0.530 | 0.515 |  | 608,256 | 20 |" in out
    assert "| hyperadapter | 0.708 ± 0.000 |" in out
    assert "| one LoRA | +0.104 ± 0.000 |" in out


def test_known_layers_give_what_minilm_gives() -> None:
    minilm()
    expected = SentenceTransformer(str(encoder_path()), device="cpu")
    expected.max_seq_length = TOKENS
    model = base()
    texts = ["Who wrote Dracula ?", "a", "a much longer text " * 8]
    for order in (texts, texts[::-1]):
        assert np.allclose(model.encode(order), expected.encode(order), atol=FLOAT32_FORWARD)


@pytest.mark.slow
@pytest.mark.usefixtures("corpora")
def test_fast_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["embeddings", "--fast", "--output", str(tmp_path)])
    embeddings.main()
    rows = read_rows(tmp_path / "embeddings.jsonl")
    assert len(rows) == sum(len(rates) for rates in RATES.values()) - 1 + 4
    sizes = {row["arm"]: row["parameters"] for row in rows}
    # Nearly as many in all that are trained.
    assert sizes[ONE] == sizes[SEPARATE]
    assert abs(sizes[OURS] / sizes[ONE] - 1) < 0.01
    assert all(0 <= score <= 1 for row in rows for score in row["scores"].values())
    # A half row is run again.
    (tmp_path / "embeddings.jsonl").unlink()
    for row in rows[:-1]:
        append_row(tmp_path / "embeddings.jsonl", row)
    capsys.readouterr()
    embeddings.main()
    assert len(read_rows(tmp_path / "embeddings.jsonl")) == len(rows)
