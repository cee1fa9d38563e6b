"""Tiny embedding models: a random BERT with mean pooling, and adapters that visibly change it."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import BertConfig, BertModel

from hyperadapt.sentence_transformers import add_hyperadapter
from tests.support.helpers import TASKS, adapter_config, make_active
from tests.support.trl_runs import tokenizer

# Of different lengths, so that they are sorted.
TEXTS = ["red", "which red green blue red green", "green blue", "which blue red", "blue red green which"]
TEXT_TASKS = ["beta", "alpha", "gamma", "beta", "alpha"]


def save_base(folder: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def plain(folder: str) -> SentenceTransformer:
    transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(32), Normalize()], device="cpu")


def adapted(folder: str, tasks: Any = TASKS, **changes: Any) -> SentenceTransformer:
    config = adapter_config(target_modules=["query", "value"], tasks=tasks, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = add_hyperadapter(plain(folder), config)
    make_active(model.transformers_model)
    return model
