"""Base models and their tokenizers, as a recipe names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig, T5Config, XLNetConfig

from hyperadapt.recipes import Recipe
from hyperadapt.recipes.base_models import load_tokenizer
from tests.support.tiny_runs import tokenizer


@pytest.mark.parametrize(
    ("config", "own", "length"),
    [
        (BertConfig(max_position_embeddings=24), None, 24),
        (BertConfig(max_position_embeddings=24), 16, 16),
        # Distances have no end.
        (T5Config(), None, None),
        (XLNetConfig(), None, None),
    ],
)
def test_a_tokenizer_cuts_to_the_positions_of_the_model(
    tmp_path: Path, config: Any, own: int | None, length: int | None
) -> None:
    saved = tokenizer("SEQ_CLS")
    endless = saved.model_max_length
    saved.model_max_length = own or endless
    saved.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
    loaded = load_tokenizer(Recipe(str(tmp_path), "out", {"task_type": "SEQ_CLS"}, {}))
    assert loaded.model_max_length == (length or endless)
    cut = loaded("a " * 30, truncation=True, max_length=min(loaded.model_max_length, 99))
    assert len(cut["input_ids"]) == (length or 32)
