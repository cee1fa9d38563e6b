"""One run of the architecture search: its data, its candidates, and how they are trained."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from benchmarks.stability.data import Batch, evaluate, split_encoder
from benchmarks.stability.runs import train
from examples.support.encoder import encode, load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import load_task
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.hypernetwork import Generated
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.trainer import TASK_COLUMN
from hyperadapt.tuner.active import find_tuner

ALL = r".*\.(query|key|value|dense)"
TARGETS = {
    "query": r".*\.query",
    "value": r".*\.value",
    "query, value": r".*\.(query|value)",
    "attention but key": r".*\.(query|value|attention\.output\.dense)",
    "all of the last layer": r".*\.layer\.2" + ALL,
    "all": ALL,
}
MAX_LENGTH = 16
BATCH_SIZE = 16
EVALUATION_BATCH = 128


class Candidate(NamedTuple):
    """An architecture.

    Attributes:
        r: Its rank.
        targets: Its set of modules, a key of ``TARGETS``.
    """

    r: int
    targets: str

    def __str__(self) -> str:
        return f"{self.targets}; r = {self.r}"


def all_candidates(ranks: Sequence[int]) -> list[Candidate]:
    """Every rank at every set of modules.

    Args:
        ranks: The ranks.

    Returns:
        The candidates, by sets.
    """
    return [Candidate(r, targets) for targets in TARGETS for r in ranks]


@dataclass(frozen=True)
class Rows:
    """Rows of a split, with the lower layers' output in place of their tokens.

    Attributes:
        input_ids: That output, shape ``(rows, MAX_LENGTH, hidden_size)``, bfloat16.
        attention_mask: 1 for tokens, 0 for padding, shape ``(rows, MAX_LENGTH)``.
        labels: Class ids, shape ``(rows,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice, tasks: Tensor) -> Batch:
        """Some rows as a batch.

        Args:
            rows: Their indices.
            tasks: The candidate of each, shape ``(len(rows),)``; of one element for all of them.

        Returns:
            The batch.
        """
        labels = self.labels[rows]
        return {
            "input_ids": self.input_ids[rows],
            "attention_mask": self.attention_mask[rows],
            "labels": labels,
            TASK_COLUMN: tasks.expand(len(labels)),
        }


class SearchData:
    """Rows and base model of all runs.

    Args:
        rows: Most rows of a split.

    Attributes:
        base: The base model's upper layers, in bfloat16.
        train: Rows to train on.
        validation: Rows to select on.
        test: Rows of the truth.
    """

    def __init__(self, rows: int) -> None:
        task, tokenizer = load_task("trec6"), load_tokenizer()
        self.base = load_matcher([task], tokenizer, torch.bfloat16)
        lower = split_encoder(self.base)
        collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=MAX_LENGTH)
        splits = []
        for split in ("train", "validation", "test"):
            [encoded] = encode([task], split, tokenizer, max_rows=rows, max_length=MAX_LENGTH)
            splits.append(_computed(lower, collate(list(encoded))))
        self.train, self.validation, self.test = splits

    def training_batches(self, steps: int, candidates: int, seed: int) -> list[Batch]:
        """Batches of random rows with random candidates.

        Args:
            steps: How many.
            candidates: Number of candidates.
            seed: Of both.

        Returns:
            The batches.
        """
        generator = torch.Generator().manual_seed(seed)
        size = (steps, BATCH_SIZE)
        rows = torch.randint(len(self.train.labels), size, generator=generator)
        tasks = torch.randint(candidates, size, generator=generator)
        return [self.train.batch(*drawn) for drawn in zip(rows, tasks, strict=True)]


@torch.no_grad()
def _computed(lower: nn.Module, batch: Batch) -> Rows:
    states = [
        lower(ids, mask).last_hidden_state
        for ids, mask in zip(*(torch.split(batch[name], 64) for name in ("input_ids", "attention_mask")), strict=True)
    ]
    return Rows(torch.cat(states), batch["attention_mask"], batch["labels"])


def cut_to_candidates(network: HyperAdapterNetwork, candidates: Sequence[Candidate]) -> None:
    """Have a network generate, as the update of a task, one of the rank and at the modules of its candidate.

    A is zero in the rows above the candidate's rank, and everywhere at other modules. That is enough: the same columns
    of B then multiply zeros, and get no gradient. The normalisation sees the update as it is cut.

    Args:
        network: The network; hooks are added to it.
        candidates: The candidate of each task.
    """
    masks = {}
    for position in network.positions:
        ranks = [c.r if re.fullmatch(TARGETS[c.targets], position.name) else 0 for c in candidates]
        masks[position.name] = (torch.arange(position.r) < torch.tensor(ranks)[:, None])[:, :, None]
    asked: list[Tensor] = []

    def remember(module: nn.Module, tasks: tuple[Tensor], embeddings: Tensor) -> None:
        asked[:] = tasks

    def cut(module: nn.Module, args: Any, generated: list[Generated]) -> list[Generated]:
        return [
            group._replace(
                lora_A=group.lora_A * torch.stack([masks[position.name] for position in group.positions], 1)[asked[0]]
            )
            for group in generated
        ]

    network.task_embedding.register_forward_hook(remember)
    network.hypernetwork.register_forward_hook(cut)


def build_search(arm: str, data: SearchData, candidates: Sequence[Candidate], seed: int) -> PeftModel:
    """The base model with a hyperadapter of all candidates.

    Args:
        arm: ``"shared weights"``, or the normalisation.
        data: Has the base model.
        candidates: The candidates.
        seed: Of the weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    r = max(candidate.r for candidate in candidates)
    config = HyperAdapterConfig(
        r=r,
        lora_alpha=r,
        target_modules=ALL,
        tasks=[str(candidate) for candidate in candidates],
        normalization="none" if arm == "shared weights" else arm,
    )
    model = get_peft_model(copy.deepcopy(data.base), config)
    network = find_tuner(model).router.network("default")
    cut_to_candidates(network, candidates)
    if arm == "shared weights":
        embeddings = network.task_embedding.weight.requires_grad_(False)
        embeddings.copy_(embeddings[:1].clone())
    return model


def build_alone(candidate: Candidate, data: SearchData, seed: int) -> PeftModel:
    """The base model with one candidate as plain LoRA.

    Args:
        candidate: The candidate.
        data: Has the base model.
        seed: Of the weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=candidate.r, lora_alpha=candidate.r, target_modules=TARGETS[candidate.targets])
    return get_peft_model(copy.deepcopy(data.base), config)


def accuracy(model: PeftModel, rows: Rows, candidate: int | None) -> float:
    """Accuracy of a candidate.

    Args:
        model: The model.
        rows: The rows.
        candidate: Its index where the model is a search; None for a plain LoRA.

    Returns:
        The accuracy.
    """
    tasks = torch.tensor([candidate or 0])
    starts = range(0, len(rows.labels), EVALUATION_BATCH)
    batches = [rows.batch(slice(start, start + EVALUATION_BATCH), tasks) for start in starts]
    return evaluate(model, batches, takes_tasks=candidate is not None)[1]


def search(
    arm: str, data: SearchData, candidates: Sequence[Candidate], steps: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train one search, and evaluate every candidate with its weights.

    Args:
        arm: The arm.
        data: The data.
        candidates: The candidates.
        steps: How many to train.
        rate: The highest learning rate.
        seed: Of weights and batches.

    Returns:
        Trained parameters, CPU seconds, and each candidate's validation accuracy.
    """
    batches, started = data.training_batches(steps, len(candidates), seed), time.process_time()
    model = build_search(arm, data, candidates, seed)
    train(model, batches, rate, takes_tasks=True)
    accuracies = {str(c): accuracy(model, data.validation, index) for index, c in enumerate(candidates)}
    return {
        "parameters": model.get_nb_trainable_parameters()[0],
        "seconds": time.process_time() - started,
        "validation": accuracies,
    }


def train_alone(
    data: SearchData, candidates: Sequence[Candidate], steps: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train every candidate as plain LoRA.

    Args:
        data: The data.
        candidates: The candidates.
        steps: How many to train each.
        rate: The highest learning rate.
        seed: Of weights and batches, which are the same for all candidates.

    Returns:
        Each candidate's parameters, validation accuracy and test accuracy, and the CPU seconds of training all and
        validating them.
    """
    values: dict[str, Any] = {"parameters": {}, "seconds": 0.0, "validation": {}, "test": {}}
    batches = data.training_batches(steps, len(candidates), seed)
    for candidate in candidates:
        name, started = str(candidate), time.process_time()
        model = build_alone(candidate, data, seed)
        train(model, batches, rate, takes_tasks=False)
        values["validation"][name] = accuracy(model, data.validation, None)
        values["seconds"] += time.process_time() - started
        values["parameters"][name] = model.get_nb_trainable_parameters()[0]
        values["test"][name] = accuracy(model, data.test, None)
    return values
