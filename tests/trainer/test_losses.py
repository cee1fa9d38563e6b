"""Losses of single rows against the loss that the model itself gives for each row alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from transformers.modeling_outputs import ModelOutput

from hyperadapt.trainer.losses import row_losses
from tests.support.helpers import base_model, example_batch, row_of
from tests.support.tolerances import FLOAT32_FORWARD

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.2,
    "num_labels": 3,
}


def classifier(kind: type, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**TINY | options)).eval()


def cases() -> dict[str, tuple[Any, dict[str, Tensor], bool]]:
    plain = {key: value for key, value in example_batch("bert").items() if key != "labels"}
    tokens = torch.randint(0, 3, (4, 7), generator=torch.Generator().manual_seed(0))
    tokens[1, 3:] = tokens[2, :5] = -100
    language = example_batch("llama")
    language["labels"][0, :4] = language["labels"][1, 5:] = -100
    sequence = example_batch("t5")
    sequence["labels"][0, 2:] = -100
    numbers = torch.tensor([0.5, -1.0, 2.0, 0.0])
    many = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    regression = classifier(BertForSequenceClassification, num_labels=1)
    multi = classifier(BertForSequenceClassification, problem_type="multi_label_classification")
    return {
        "classification": (base_model("bert"), example_batch("bert"), False),
        "regression": (regression, plain | {"labels": numbers}, False),
        "multi-label": (multi, plain | {"labels": many}, False),
        "token classification": (classifier(BertForTokenClassification), plain | {"labels": tokens}, False),
        "causal language model": (base_model("llama"), language, True),
        "sequence to sequence": (base_model("t5"), sequence, False),
    }


@pytest.mark.parametrize("name", cases())
@torch.no_grad()
def test_equal_the_model_s_own_loss_of_each_row(name: str) -> None:
    model, batch, shift = cases()[name]
    outputs = model(**batch)
    sums, counts = row_losses(outputs, batch["labels"], shift=shift)
    expected = torch.stack([model(**row_of(batch, row)).loss for row in range(4)])
    assert_close(sums / counts, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    # Weighted by their terms, the rows give the batch's loss.
    assert_close(sums.sum() / counts.sum(), outputs.loss, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_log_probabilities_in_place_of_logits() -> None:
    outputs = ModelOutput(
        log_probs=torch.tensor([[-1.0, -2, 0], [-3, 0, 0]]), label_mask=torch.tensor([[1, 1, 0], [1, 0, 0]])
    )
    sums, counts = row_losses(outputs, torch.zeros(2, 4), shift=True)
    assert (sums.tolist(), counts.tolist()) == ([3, 3], [2, 1])


def test_a_row_without_labels_counts_nothing() -> None:
    labels = torch.full((2, 3), -100)
    sums, counts = row_losses({"logits": torch.ones(2, 3, 5)}, labels, shift=True)
    assert (sums.tolist(), counts.tolist()) == ([0, 0], [0, 0])


@pytest.mark.parametrize("logits", [None, torch.ones(3, 2), torch.ones(2), torch.ones(2, 1, 1, 1)])
def test_outputs_without_rows(logits: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"cannot be told from logits of shape .* Pass log_task_losses=False"):
        row_losses({"logits": logits}, torch.zeros(2), shift=False)
