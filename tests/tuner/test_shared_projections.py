"""Projections that the model also applies to what all rows share, as DeBERTa does to relative positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedModel,
)

from hyperadapt import export_lora
from tests.support.helpers import (
    MIXED,
    adapter_config,
    double,
    example_batch,
    gradients,
    logits,
    make_active,
    row_of,
)
from tests.support.tolerances import EXPORT_FLOAT32, FLOAT64_MODEL

CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}
BATCH = example_batch("bert")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "num_labels": 3,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}
# By the modules that see relative positions.
SHARED = {"deberta": ["pos_proj", "pos_q_proj"], "deberta-v2": ["query_proj", "key_proj"]}


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "deberta":
        return DebertaForSequenceClassification(DebertaConfig(**SIZES)).eval().double()
    config = DebertaV2Config(**SIZES, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)
    return DebertaV2ForSequenceClassification(config).eval().double()


def adapted(name: str, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    config = adapter_config(target_modules="all-linear", task_type="SEQ_CLS", **changes)
    return make_active(get_peft_model(base_model(name), config)).double()


@pytest.mark.parametrize("name", SHARED)
def test_a_batch_of_one_task_equals_its_rows_the_merged_model_and_the_exported_lora(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    shapes: list[tuple[int, ...]] = []
    shared = model.get_submodule(f"base_model.model.deberta.encoder.layer.0.attention.self.{SHARED[name][0]}")
    shared.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    expected = logits(model, BATCH, tasks="beta")
    assert any(shape[0] != len(MIXED) for shape in shapes)
    assert (expected - logits(base_model(name), BATCH)).abs().max() > 0.1
    rows = [logits(model, row_of(BATCH, row), tasks="beta") for row in range(len(MIXED))]
    assert_close(torch.cat(rows), expected, **CLOSE)
    export_lora(model, "beta", tmp_path)
    exported = PeftModel.from_pretrained(base_model(name), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(logits(exported, BATCH), expected, rtol=EXPORT_FLOAT32, atol=EXPORT_FLOAT32)
    model.set_task("beta")
    assert_close(logits(model, BATCH), expected, **CLOSE)
    assert_close(logits(model.merge_and_unload(), BATCH), expected, **CLOSE)


@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_a_batch_of_one_task_are_those_of_its_rows(name: str) -> None:
    model, batch = adapted(name), double(BATCH)

    def sums(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        for one in batches:
            model(**one, tasks="beta").logits.square().sum().backward()
        return gradients(model)

    assert_close(sums([batch]), sums([row_of(batch, row) for row in range(len(MIXED))]), **CLOSE)


@pytest.mark.parametrize("name", SHARED)
def test_mixed_batches_need_these_modules_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=rf"({'|'.join(SHARED[name])})' got an input of shape"):
        logits(adapted(name), BATCH, tasks=MIXED)
    model = adapted(name, exclude_modules=SHARED[name])
    rows = [logits(model, row_of(BATCH, row), tasks=task) for row, task in enumerate(MIXED)]
    assert_close(logits(model, BATCH, tasks=MIXED), torch.cat(rows), **CLOSE)
