"""One run of the study of first steps: a small set of labelled texts, a classifier, and an arm's adapter."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup, logging
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.common.rows import Row
from benchmarks.stability.data import Batch, computed_rows, in_batches, split_encoder, without_tasks
from examples.support.encoder import batches, encode, label_offsets, load_base, load_tokenizer
from examples.support.task_descriptions import DESCRIPTIONS
from examples.support.text_tasks import TextTask, encoder_path, load_task
from hyperadapt import HyperAdapterConfig

RANK = 8
BATCH_SIZE = 16
MAX_LENGTH = 16
FROZEN_LAYERS = 4
# As a recipe has them.
WARMUP, CLIP_AT = 1 / 16, 1.0
LORA, LEARNED, TEXT = "LoRA", "hyperadapter", "hyperadapter, text"
ARMS = (LORA, LEARNED, TEXT)


class OwnClasses(BertForSequenceClassification):
    """A classifier for several tasks, in which a row competes among the classes of its own task alone."""

    task_of_label: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.register_buffer("task_of_label", torch.zeros(config.num_labels, dtype=torch.long), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **others: Any
    ) -> SequenceClassifierOutput:
        """Logits ``(batch, num_labels)``, -inf for classes of other tasks, and the cross entropy."""
        logits = self.classifier(self.bert(input_ids, attention_mask).pooler_output.float())
        logits = logits.masked_fill(self.task_of_label != self.task_of_label[labels][:, None], -torch.inf)
        return SequenceClassifierOutput(loss=cross_entropy(logits, labels), logits=logits)


@dataclass(frozen=True)
class SmallData:
    """A set of tasks with few rows, the lower layers' output in place of their tokens.

    Attributes:
        tasks: The tasks.
        base: The layers above the frozen ones, in bfloat16; the classifier, which has no weights yet, in float32.
        train: Training rows of all tasks.
        evaluation: Batches of each task.
        vectors: The frozen base model's vectors of the tasks' descriptions.
    """

    tasks: list[TextTask]
    base: OwnClasses
    train: list[Any]
    evaluation: list[list[Batch]]
    vectors: Tensor

    @property
    def majority(self) -> float:
        """Mean accuracy of always giving a task's most frequent class."""
        labels = [torch.cat([batch["labels"] for batch in members]) for members in self.evaluation]
        return fmean(float(torch.bincount(one).max()) / len(one) for one in labels)


def load_small(names: Sequence[str], split: str, train_rows: int, rows: int) -> SmallData:
    """Read tasks; runs are evaluated on rows of a split."""
    logging.set_verbosity_error()
    tasks, tokenizer = [load_task(name) for name in names], load_tokenizer()
    offsets = label_offsets(tasks)
    base = OwnClasses.from_pretrained(encoder_path(), num_labels=offsets[-1]).eval()
    base.task_of_label = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(offsets).diff())
    base.bert.bfloat16()
    lower = split_encoder(base, FROZEN_LAYERS)
    read = {
        name: [
            [row for batch in batches(encoded, tokenizer) for row in computed_rows(lower, batch)]
            for encoded in encode(tasks, name, tokenizer, max_rows=count, max_length=MAX_LENGTH)
        ]
        for name, count in (("train", train_rows), (split, rows))
    }
    with torch.no_grad():
        texts = tokenizer([DESCRIPTIONS[name][0] for name in names], padding=True, return_tensors="pt")
        vectors = load_base(2, seed=0).embed(**texts)
    train = [row for members in read["train"] for row in members]
    return SmallData(tasks, base, train, [list(in_batches(members, 64)) for members in read[split]], vectors)


def build(arm: str, data: SmallData, seed: int) -> PeftModel:
    """A copy of the base model with an arm's adapter and a new classifier, whose weights a seed draws."""
    torch.manual_seed(seed)
    base = copy.deepcopy(data.base)
    nn.init.normal_(base.classifier.weight, std=base.config.initializer_range)
    nn.init.zeros_(base.classifier.bias)
    fields: dict[str, Any] = {"task_type": "SEQ_CLS", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    if arm == LORA:
        return get_peft_model(base, LoraConfig(**fields))
    tasks = {task.name: task.description for task in data.tasks}
    if arm == TEXT:
        known = dict(zip(tasks.values(), data.vectors, strict=True))
        fields |= {
            "task_embedding": "text",
            "text_encoder": lambda texts: torch.stack([known[text] for text in texts]),
        }
    return get_peft_model(base, HyperAdapterConfig(tasks=tasks, **fields))


def run_once(arm: str, data: SmallData, rate: float, seed: int, measured_after: Sequence[int]) -> Row:
    """Train as a recipe does, and measure the mean accuracy over tasks after some numbers of steps."""
    started = time.process_time()
    model, steps = build(arm, data, seed), measured_after[-1]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    accuracies: dict[str, list[float]] = {}
    for step, batch in enumerate(training_batches(data, steps, seed), 1):
        model.train()
        model(**of_arm(arm, batch)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_AT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in measured_after:
            accuracies[str(step)] = [round(accuracy(model.eval(), arm, one), 4) for one in data.evaluation]
    return {
        "accuracies": accuracies,
        "majority": round(data.majority, 4),
        "parameters": model.get_nb_trainable_parameters()[0],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def training_batches(data: SmallData, steps: int, seed: int) -> list[Batch]:
    """The batches of a seed, the same for all arms: epochs in random order, with the tasks mixed."""
    generator = np.random.default_rng(seed)
    count = steps * BATCH_SIZE
    order = np.concatenate([generator.permutation(len(data.train)) for _ in range(count // len(data.train) + 1)])
    return list(in_batches([data.train[place] for place in order[:count]], BATCH_SIZE))


def of_arm(arm: str, batch: Batch) -> Batch:
    """A batch with the tasks, if the arm is told them."""
    return without_tasks(batch) if arm == LORA else batch


@torch.no_grad()
def accuracy(model: nn.Module, arm: str, members: Sequence[Batch]) -> float:
    """Share of rows whose own class scores highest."""
    hits = [model(**of_arm(arm, batch)).logits.argmax(-1) == batch["labels"] for batch in members]
    return float(torch.cat(hits).float().mean())
