"""Losses by task against the loss that the model itself gives: of a batch of one task, and of several."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from hyperadapt.trainer import HyperAdapterTrainer, TaskCollator
from hyperadapt.trainer.losses import BatchLoss, TaskLosses
from tests.support.helpers import TASKS, adapted_model, adapter_config, base_model, example_batch, make_active
from tests.support.tolerances import FLOAT32_FORWARD
from tests.trainer.test_trainer import arguments, task_rows

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CASE = tuple[nn.Module, dict[str, Tensor]]


def random(*shape: int, high: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) if high is None else torch.randint(high, shape, generator=generator)


def bert(kind: Any, labels: dict[str, Tensor], **options: Any) -> CASE:
    batch = {key: value for key, value in example_batch("bert").items() if key != "labels"}
    return kind(BertConfig(**TINY | {"initializer_range": 0.2, "num_labels": 3} | options)), batch | labels


def masked(*shape: int, high: int) -> Tensor:
    labels = random(*shape, high=high)
    labels[1, 3:] = labels[2, :5] = -100
    return labels


def llava() -> CASE:
    vision = CLIPVisionConfig(**TINY, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**TINY, num_key_value_heads=1, vocab_size=50)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    ids = torch.cat([torch.full((4, 4), 49), random(4, 6, high=40)], 1)
    return model, {"input_ids": ids, "pixel_values": random(4, 3, 16, 16), "labels": random(4, 10, high=40)}


def mixture() -> CASE:
    config = MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2, vocab_size=50, output_router_logits=True)
    ids = random(4, 7, high=50)
    return MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}


def speech(reduction: str) -> CASE:
    sizes = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 12}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**TINY, **sizes, **more, ctc_loss_reduction=reduction))
    return model, {"input_values": random(4, 400), "labels": random(4, 5, high=10) + 1}


def segments() -> CASE:
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "patch_sizes": [3]}
    more = {"strides": [2], "num_attention_heads": [1], "mlp_ratios": [1], "decoder_hidden_size": 8, "num_labels": 3}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, **more))
    return model, {"pixel_values": random(4, 3, 16, 16), "labels": random(4, 16, 16, high=3)}


def captions() -> CASE:
    decoder = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, add_cross_attention=True))
    encoder = ViTModel(ViTConfig(**TINY, image_size=16, patch_size=8))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model, {"pixel_values": random(4, 3, 16, 16), "labels": random(4, 5, high=90) + 3}


def language(name: str) -> CASE:
    batch = example_batch(name)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :3] = batch["labels"][1, 4:] = -100
    return base_model(name), batch


def classes(name: str) -> CASE:
    return base_model(name), example_batch(name)


def choices() -> CASE:
    return BertForMultipleChoice(BertConfig(**TINY)), {
        "input_ids": random(4, 3, 6, high=50),
        "labels": torch.tensor([0, 2, 1, 0]),
    }


def spans() -> dict[str, Tensor]:
    return {"start_positions": torch.tensor([1, 0, 3, 2]), "end_positions": torch.tensor([4, 1, 5, 2])}


def numbers(*shape: int) -> dict[str, Tensor]:
    return {"labels": random(*shape)}


MULTI = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])

# Heads, and whether a batch of several tasks can be told apart.
HEADS: dict[str, tuple[Callable[[], CASE], bool]] = {
    "causal language model": (lambda: language("llama"), True),
    "causal language model, Conv1D": (lambda: language("gpt2"), True),
    "sequence to sequence": (lambda: language("t5"), True),
    "images and text": (llava, True),
    "captions of images": (captions, True),
    "masked language model": (lambda: bert(BertForMaskedLM, {"labels": masked(4, 7, high=90)}), True),
    "classification": (lambda: classes("bert"), True),
    "classification of images": (lambda: classes("vit"), True),
    "token classification": (lambda: bert(BertForTokenClassification, {"labels": masked(4, 7, high=3)}), True),
    "multiple choice": (choices, True),
    "multi-label": (
        lambda: bert(BertForSequenceClassification, {"labels": MULTI}, problem_type="multi_label_classification"),
        True,
    ),
    "regression": (lambda: bert(BertForSequenceClassification, numbers(4), num_labels=1), True),
    "regression of several numbers": (
        lambda: bert(BertForSequenceClassification, numbers(4, 3), problem_type="regression"),
        True,
    ),
    "question answering": (lambda: bert(BertForQuestionAnswering, spans(), num_labels=2), True),
    "mixture with a loss for balance": (mixture, False),
    "speech, sum": (lambda: speech("sum"), False),
    "speech, mean": (lambda: speech("mean"), False),
    "segmentation": (segments, False),
}


def make(name: str) -> CASE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = HEADS[name][0]()
    return model.eval(), batch


def reduce(sums: Tensor) -> Tensor:
    return sums


def rows_of(batch: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {name: value[chosen] for name, value in batch.items()}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_of_one_task_is_the_loss(name: str) -> None:
    model, batch = make(name)
    losses = TaskLosses(TASKS)
    outputs = model(**batch)
    losses.add(torch.full((4,), 1), BatchLoss(outputs.loss), outputs, batch)
    logged = losses.collect(reduce)
    assert logged.keys() == {"beta"}
    assert_close(logged["beta"], outputs.loss.item(), rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_of_several_tasks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make(name)
    losses = TaskLosses(TASKS)
    tasks = torch.tensor([1, 0, 2, 1])
    outputs = model(**batch)
    logging.enable_propagation()
    try:
        for _ in range(2):
            losses.add(tasks, BatchLoss(outputs.loss), outputs, batch)
    finally:
        logging.disable_propagation()
    logged = losses.collect(reduce)
    is_known = HEADS[name][1]
    assert logged.keys() == (set(TASKS) if is_known else set())
    assert caplog.text.count("cannot be told apart by task") == (0 if is_known else 1)
    for index, task in enumerate(TASKS[: len(logged)]):
        expected = model(**rows_of(batch, tasks == index)).loss.item()
        assert_close(logged[task], expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_log_probabilities_in_place_of_logits() -> None:
    outputs = ModelOutput(
        log_probs=torch.tensor([[-1.0, -2, 0], [-3, 0, 0]]), label_mask=torch.tensor([[1, 1, 0], [1, 0, 0]])
    )
    losses = TaskLosses(TASKS)
    losses.add(torch.tensor([0, 2]), BatchLoss(torch.tensor(2.0)), outputs, {"labels": torch.zeros(2, 4)})
    assert losses.collect(reduce) == {"alpha": 1.5, "gamma": 3.0}
    # Another loss of the same outputs is not mistaken for it.
    losses.add(torch.tensor([0, 2]), BatchLoss(torch.tensor(0.7)), outputs, {"labels": torch.zeros(2, 4)})
    assert losses.collect(reduce) == {}


def test_a_batch_without_labels_adds_nothing() -> None:
    labels = torch.full((2, 3), -100)
    outputs = {"logits": torch.ones(2, 3, 5)}
    losses = TaskLosses(TASKS)
    losses.add(torch.tensor([0, 1]), BatchLoss(torch.tensor(torch.nan)), outputs, {"labels": labels})
    assert losses.collect(reduce) == {}


def test_what_diverges_is_seen() -> None:
    outputs = {"logits": torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])}
    losses = TaskLosses(TASKS)
    labels = torch.tensor([0, 0])
    losses.add(torch.tensor([0, 1]), BatchLoss(torch.tensor(torch.nan)), outputs, {"labels": labels})
    logged = losses.collect(reduce)
    assert logged["alpha"] != logged["alpha"]
    assert_close(logged["beta"], 0.31326, rtol=1e-4, atol=0)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def adapted_llava() -> tuple[Any, Dataset]:
    torch.manual_seed(0)
    model, batch = llava()
    model = make_active(get_peft_model(model, adapter_config(target_modules=r".*language_model.*(q_proj|up_proj)")))
    return model, Dataset.from_dict({key: value.tolist() for key, value in batch.items()})


# Not llava, smoothed and accumulated: Trainer divides by a number of shifted labels, which it does not shift there.
CASES = [
    (name, smoothing, steps)
    for name in ("llama", "bert", "t5", "llava")
    for smoothing in (0.0, 0.1)
    for steps in (1, 2)
    if (name, smoothing, steps) != ("llava", 0.1, 2)
]


@pytest.mark.parametrize(("name", "smoothing", "steps"), CASES)
def test_what_trainer_logs_of_one_task(name: str, smoothing: float, steps: int, tmp_path: Path) -> None:
    model, rows = adapted_llava() if name == "llava" else (adapted_model(name), task_rows(name, 16, seed=1))
    if name == "t5":
        # As a collator makes them for a model that will not see the labels.
        rows = rows.add_column("decoder_input_ids", rows["labels"])
    options = arguments(
        tmp_path,
        label_smoothing_factor=smoothing,
        gradient_accumulation_steps=steps,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
    )
    trainer = HyperAdapterTrainer(model, options, TaskCollator(collate), {"gamma": rows})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert_close(entry["loss_gamma"], entry["loss"], rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
