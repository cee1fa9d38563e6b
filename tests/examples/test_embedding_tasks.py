"""The example of embeddings from data to table, with a few steps; and what its texts and scores are."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

from examples import embedding_tasks
from examples.support import embedding_texts
from examples.support.embedding_texts import Amount, accuracy, mistyped, ndcg, training_data
from examples.support.text_tasks import load_task
from tests.support.helpers import minilm

# TrainingArguments of transformers 5.23 say so of a name that sentence-transformers 6.2 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture
def corpora() -> None:
    minilm()
    try:
        for name in ("boolq", "trec6", "newsgroups20"):
            load_task(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("corpora")
def test_embedding_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["embedding_tasks", "--fast", "--output", str(tmp_path)])
    embedding_tasks.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.search(r"an exported task differs by [0-9](e-0[6-9]|e\+00)$", lines[-8])
    assert [line.split(" | ")[0] for line in lines[-4:]] == [f"| {name}" for name in embedding_texts.DATA]
    assert all(re.fullmatch(r"\| \w+ \| \d\.\d{3} \| \d\.\d{3} \|", line) for line in lines[-4:])


@pytest.mark.usefixtures("corpora")
def test_training_pairs() -> None:
    data = training_data(Amount(20, 10, 10, 10), 0)
    assert {name: rows.column_names for name, rows in data.items()} == {
        "retrieval": ["question", "passage"],
        "duplicates": ["question", "same"],
        "kinds": ["text", "other", "score"],
        "topics": ["text", "other", "score"],
    }
    assert all(len(rows) == 20 for rows in data.values())
    labels = {text[: embedding_texts.CHARACTERS]: label for text, label in _labels("trec6")}
    assert all((labels[row["text"]] == labels[row["other"]]) == row["score"] for row in data["kinds"])
    assert 0 < sum(data["kinds"]["score"][:]) < 20


def _labels(task: str) -> list[tuple[str, int]]:
    rows = load_task(task).train
    return list(zip(rows["text"], rows["label"], strict=True))


def test_spelling() -> None:
    text = "Which presidents of the USA were Masons ?"
    typed = [mistyped(text, np.random.default_rng(seed)) for seed in range(20)]
    assert len(set(typed)) > 10
    for one in typed:
        words = one.split()
        assert [word for word in words if len(word) <= 3][:1] != []
        assert (len(words), words[2:5], one) == (7, ["of", "the", "usa"], one.lower())


def test_scores_by_hand() -> None:
    queries = np.eye(3)
    documents = np.array([[1.0, 0, 0], [0, 0.5, 1.0], [0, 1.0, 0.5], [0, 0, 0]])
    # The first is found at once, the two others at the second place.
    assert ndcg(queries, documents) == pytest.approx((1 + 2 / np.log2(3)) / 3)
    assert ndcg(queries, documents, at=1) == pytest.approx(1 / 3)
    known = np.concatenate([np.tile([1.0, 0], (10, 1)), np.tile([0, 1.0], (10, 1))])
    assert accuracy(known, [0] * 10 + [1] * 10, np.eye(2), [0, 0]) == 0.5
