"""The arms of the instruction study: what is adapted, and where the instruction enters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.concepts.arms import whitening
from benchmarks.instructions.data import MINILM, SMOLLM2, InstructionData, Row
from benchmarks.instructions.model import Batch
from benchmarks.instructions.tasks import Task, trained_wordings
from hyperadapt import HyperAdapterConfig

RANK = 8
READ_OF_TASK = 12
"""Rows that the hyperadapter by examples draws from in training, of each task."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def standardising(trained: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes from vectors what the trained ones have in common, so that the rest has length 1 in the mean."""
    mean = trained.mean(0)
    length = (trained - mean).norm(dim=-1).mean()
    return lambda vectors: (vectors - mean) / length


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        adapter: ``"hyperadapter"``: a hypernetwork makes that of each row's description; ``"lora"``: one for all;
            ``"none"``: the base model.
        is_told: Whether the description stands before the text, in the input.
        fields: Of the hyperadapter's configuration.
        readers: The models whose vectors of a description the hypernetwork reads, one behind the other.
        vectors: From the trained descriptions' vectors of a model, what changes its vectors.
        reads: Whether a hyperadapter reads examples in place of descriptions.
        lengthened: How many times as many steps it is trained.
    """

    adapter: str = "lora"
    is_told: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    readers: tuple[str, ...] = (MINILM, SMOLLM2)
    vectors: Callable[[Tensor], Callable[[Tensor], Tensor]] = standardising
    reads: bool = False
    lengthened: int = 1

    @property
    def is_hyperadapter(self) -> bool:
        """Whether a hypernetwork makes adapters."""
        return self.adapter == "hyperadapter"


WIDTH = {"hypernetwork_dim": 64}
HYPER = Arm("hyperadapter", fields=WIDTH)
WHITENED = replace(HYPER, vectors=whitening)
ARMS = {
    "hyperadapter": HYPER,
    "hyperadapter, whitened": WHITENED,
    # In about the time that the LoRA that is told takes.
    "hyperadapter, twice the steps": replace(WHITENED, lengthened=2),
    "lora": Arm(),
    "lora, told": Arm(is_told=True),
    "base model, told": Arm("none", is_told=True),
}
READER = Arm("hyperadapter", fields=WIDTH, reads=True)
VARIANTS = {
    "MiniLM's vectors alone": replace(HYPER, readers=(MINILM,)),
    "SmolLM2's vectors alone": replace(HYPER, readers=(SMOLLM2,)),
    "width 16": replace(HYPER, fields={"hypernetwork_dim": 16}),
    "width 128": replace(HYPER, fields={"hypernetwork_dim": 128}),
    "soft_frobenius": replace(HYPER, fields=WIDTH | {"normalization": "soft_frobenius"}),
}
"""The arm "hyperadapter" with one thing changed."""


def build(arm: Arm, data: InstructionData, tasks: Sequence[Task], seed: int) -> nn.Module:
    """A copy of the upper layers with an arm's adapter for these tasks, whose weights a seed draws."""
    torch.manual_seed(seed)
    model = copy.deepcopy(data.upper)
    if arm.adapter == "none":
        return model
    shared: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS}
    if not arm.is_hyperadapter:
        return get_peft_model(model, LoraConfig(**shared))
    if arm.reads:
        return _reader(model, data, [task.name for task in tasks], shared | arm.fields)
    config = HyperAdapterConfig(
        tasks={task.name: trained_wordings(task) for task in tasks},
        task_embedding="text",
        text_encoder=text_encoder(arm, data, tasks),
        **shared | arm.fields,
    )
    return get_peft_model(model, config)


def _reader(model: nn.Module, data: InstructionData, names: list[str], fields: dict[str, Any]) -> PeftModel:
    """A hyperadapter that reads examples, with those of the trained tasks."""
    config = HyperAdapterConfig(task_type="CAUSAL_LM", tasks=names, task_embedding="examples", **fields)
    reader = get_peft_model(model, config)
    rows = {name: data.rows["train"][name][: min(READ_OF_TASK, data.size.cached)] for name in names}
    examples = {name: [{"row": row} for row in members] for name, members in rows.items()}
    reader.set_examples(examples, data_collator=collated(data))
    return reader


def collated(data: InstructionData) -> Callable[[list[dict[str, Row]]], Batch]:
    """What makes batches of examples."""
    return lambda examples: data.batch([one["row"] for one in examples])


def text_encoder(arm: Arm, data: InstructionData, tasks: Sequence[Task]) -> Callable[[list[str]], Tensor]:
    """What gives the vectors of descriptions, as the arm changes them."""
    known = [wording for task in tasks for wording in trained_wordings(task)]
    read = {model: (data.vectors[model], arm.vectors(data.vectors[model](known))) for model in arm.readers}
    return lambda texts: torch.cat([change(vectors(texts)) for vectors, change in read.values()], dim=-1)


def embeddings(model: PeftModel, encode: Callable[[list[str]], Tensor], descriptions: Sequence[str]) -> Tensor:
    """The task embedding of each description, ``(descriptions, task_embedding_dim)``."""
    unique = list(dict.fromkeys(descriptions))
    made = torch.cat([model.embed_description(text, text_encoder=encode).reshape(1, -1) for text in unique])
    return made[[unique.index(text) for text in descriptions]]
