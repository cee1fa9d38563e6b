"""Encoders of descriptions: sentence-transformers models and functions, and what they may not return."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from hyperadapt import HyperAdapterConfig
from hyperadapt.tasks.encoders import encode_like, encode_texts, with_text_vectors
from tests.support.helpers import adapter_config, base_model, letters, minilm, snapshot

TEXTS = ["Tell spam from genuine messages.", "Is this SMS spam?", "Name the topic of a news article."]


def test_sentence_transformers_model() -> None:
    vectors, revision = encode_texts(minilm(), TEXTS)
    assert revision is None
    assert (vectors.shape, vectors.dtype) == ((3, 384), torch.float32)
    cosines = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    assert cosines[0] > 0.5 > cosines[1]


def test_vectors_are_computed_once_and_pinned() -> None:
    config = HyperAdapterConfig(tasks={"a": TEXTS[:2], "b": TEXTS[2]}, task_embedding="text", text_encoder=letters)
    pinned, vectors = with_text_vectors(config)
    assert torch.equal(vectors, letters(TEXTS))
    assert (pinned.text_encoder, pinned.text_encoder_revision, pinned.text_embedding_dim) == (
        "function:tests.support.helpers.letters",
        None,
        26,
    )
    # The caller's configuration may serve for another model.
    assert config.text_encoder is letters
    assert config.text_embedding_dim is None
    assert with_text_vectors(pinned) == (pinned, None)


def test_only_tasks_with_text_are_encoded() -> None:
    sources = {"a": "learned", "b": "both"}
    config = HyperAdapterConfig(tasks={"a": TEXTS[0], "b": TEXTS[2]}, task_embedding=sources, text_encoder=letters)
    _, vectors = with_text_vectors(config)
    assert torch.equal(vectors, letters(TEXTS[2:]))
    assert with_text_vectors(HyperAdapterConfig(tasks={"a": TEXTS[0]}))[1] is None


def test_numpy_arrays_and_half_precision_are_taken() -> None:
    vectors, _ = encode_texts(lambda texts: np.ones((len(texts), 4)), TEXTS)
    assert vectors.dtype == torch.float32
    assert encode_texts(lambda texts: torch.ones(len(texts), 4).bfloat16(), TEXTS)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda texts: "vectors", "gave str, which is no tensor. It must take a list of texts"),
        (
            lambda texts: torch.ones(4),
            "gave a tensor of shape (4,) for 3 texts. It must return one of shape (texts, dim)",
        ),
        (lambda texts: torch.ones(2, 4), "gave a tensor of shape (2, 4) for 3 texts"),
        (lambda texts: torch.ones(3, 0), "gave a tensor of shape (3, 0) for 3 texts"),
        (
            lambda texts: torch.ones(3, 1).index_fill(0, torch.tensor(1), torch.nan),
            "a vector for 'Is this SMS spam?' that",
        ),
        (
            lambda texts: torch.zeros(3, 4),
            "gave a vector for 'Tell spam from genuine messages.' that is zero or not finite",
        ),
    ],
)
def test_what_encoders_may_not_return(encoder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_texts(encoder, TEXTS)


def test_vectors_that_are_compared_need_the_size_of_an_embedding() -> None:
    model = base_model("llama")
    settings: dict[str, Any] = {"tasks": {"a": TEXTS[0]}, "task_embedding": "text", "text_encoder": letters}
    config = adapter_config(**settings, conditioning="bilinear", task_embedding_dim=32)
    with pytest.raises(
        ValueError, match=r"of size task_embedding_dim=32 with .* which have size 26\. Choose a text enc"
    ):
        get_peft_model(model, config)
    assert snapshot(model).keys() == snapshot(base_model("llama")).keys()


def test_unknown_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = re.escape(f"text_encoder={str(tmp_path / 'none')!r} could not be loaded (revision None):")
    with pytest.raises(ValueError, match=message):
        encode_texts(str(tmp_path / "none"), TEXTS)


def test_sentence_transformers_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('Install it with pip install "hyperadapt[text]"')):
        encode_texts("all-MiniLM-L6-v2", TEXTS)


def test_further_descriptions_need_the_same_encoder() -> None:
    config = HyperAdapterConfig(tasks={"a": TEXTS[0]}, task_embedding="text", text_encoder=letters)
    pinned, vectors = with_text_vectors(config)
    assert torch.equal(encode_like(pinned, TEXTS[1:], vectors[0], letters), letters(TEXTS[1:]))
    with pytest.raises(
        ValueError, match=re.escape("by the function 'tests.support.helpers.letters', which a file cannot hold")
    ):
        encode_like(pinned, TEXTS[1:], vectors[0])
    with pytest.raises(ValueError, match="gives vectors of size 4, but the adapter was made with 26"):
        encode_like(pinned, TEXTS[1:], vectors[0], lambda texts: torch.ones(len(texts), 4))
    with pytest.raises(
        ValueError, match=r"is not the encoder that the adapter was made with: its vector .* a cosine of"
    ):
        encode_like(pinned, TEXTS[1:], vectors[0], lambda texts: letters(texts).flip(1))
