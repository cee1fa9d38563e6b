"""Embedding models get a hyperadapter in place, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

import torch
from peft import LoraConfig
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from hyperadapt import HyperAdapterConfig
from hyperadapt.sentence_transformers import HyperAdapterTransformer, add_hyperadapter
from tests.support.embedding_models import TEXT_TASKS, TEXTS, adapted, plain
from tests.support.helpers import TASKS, trainable
from tests.support.trl_runs import tokenizer

CONFIG = HyperAdapterConfig(tasks=TASKS, target_modules=["query", "value"])


def test_it_starts_as_the_base_model(base: str) -> None:
    model = plain(base)
    expected = model.encode(TEXTS)
    assert add_hyperadapter(model, CONFIG) is model
    assert isinstance(model[0], HyperAdapterTransformer)
    assert np.array_equal(model.encode(TEXTS, tasks="beta"), expected)
    assert {"hyperadapter_" in name for name in trainable(model)} == {True}
    assert model.get_model_kwargs() == ["tasks"]
    assert (model.max_seq_length, model.device, model.dtype) == (32, torch.device("cpu"), torch.float32)


def test_a_second_adapter_names_other_tasks(base: str) -> None:
    model = adapted(base)
    model.transformers_model.add_adapter("second", HyperAdapterConfig(tasks=["one", "two"], target_modules=["query"]))
    first = model.encode(TEXTS, tasks=TEXT_TASKS)
    model.transformers_model.set_adapter("second")
    assert np.array_equal(model.encode(TEXTS, tasks="two"), plain(base).encode(TEXTS))
    model.transformers_model.set_adapter("default")
    assert np.array_equal(model.encode(TEXTS, tasks=TEXT_TASKS), first)


def test_texts_in_one_long_row_could_not_be_told_apart(base: str) -> None:
    model = adapted(base)
    # As with flash attention, which this machine has not.
    model[0].can_flatten_inputs = True
    assert model.preprocess(TEXTS, tasks=TEXT_TASKS)["input_ids"].shape[0] == len(TEXTS)


def static() -> SentenceTransformer:
    words = tokenizer()
    return SentenceTransformer(modules=[StaticEmbedding(words.backend_tokenizer, embedding_dim=4)], device="cpu")


def of_other_methods(base: str) -> SentenceTransformer:
    entry = {"method": "get_text_features", "method_output_name": None}
    transformer = Transformer(base, modality_config={"text": entry}, module_output_name="sentence_embedding")
    return SentenceTransformer(modules=[transformer], device="cpu")


BAD_MODELS: dict[str, tuple[Any, type[Exception], str]] = {
    "peft": (lambda base: torch.nn.Linear(2, 2), TypeError, "model is a Linear, but must be a SentenceTransformer"),
    "twice": (adapted, ValueError, "The model has a hyperadapter. Add tasks to it with .*add_task"),
    "static": (lambda base: static(), TypeError, "first module is a StaticEmbedding, but must be a Transformer"),
    "features": (
        of_other_methods,
        ValueError,
        r"calls \{'text': 'get_text_features'\} of the backend 'torch', but only forward of torch takes tasks",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_other_models_are_refused(base: str, name: str) -> None:
    make, error, message = BAD_MODELS[name]
    with pytest.raises(error, match=message):
        add_hyperadapter(make(base), CONFIG)


def test_another_configuration_leaves_the_model_as_it_is(base: str) -> None:
    model = plain(base)
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=r"config=LoraConfig.* must be a HyperAdapterConfig, not LoraConfig"):
        add_hyperadapter(model, LoraConfig(target_modules=["query"]))
    assert list(model.state_dict()) == before
    assert type(model[0]) is Transformer


def test_other_kinds_of_encoders_are_refused(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    with pytest.raises(TypeError, match="A CrossEncoder has a hyperadapter, but only a SentenceTransformer hands"):
        model[0].on_model_ready(CrossEncoder(base, device="cpu"))
