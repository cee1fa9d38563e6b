"""Base models as recipes name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hyperadapt.recipes.recipe import Recipe

# None would ask whether to run code that comes with a model.
SAFELY: dict[str, Any] = {"trust_remote_code": False}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, which cuts texts to the positions that the model has, if it counts them."""
    options = {**SAFELY, "revision": recipe.revision or "main"}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(recipe.base_model, **options)
    positions = positions_of(AutoConfig.from_pretrained(recipe.base_model, **options))
    if positions is not None and positions < tokenizer.model_max_length:
        tokenizer.model_max_length = positions
    return tokenizer


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None if it has no limit, for which XLNet has -1."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    return positions if positions > 0 else None


def load_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model, with an untrained classifier of one output for each label; a tokenizer gets its padding token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {**SAFELY, "revision": recipe.revision or "main"}
    if recipe.dtype is not None:
        options["dtype"] = getattr(torch, recipe.dtype)
    if recipe.task_type == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(recipe.base_model, **options)
    names = dict(enumerate(recipe.labels))
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        recipe.base_model,
        num_labels=len(names),
        id2label=names,
        label2id={label: index for index, label in names.items()},
        ignore_mismatched_sizes=True,
        **options,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars and reports of a new classifier's missing weights."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
