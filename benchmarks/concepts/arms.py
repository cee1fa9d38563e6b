"""The arms of the concept study: what is adapted, and where a description enters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.concepts.data import ConceptData, pooled
from benchmarks.concepts.tasks import LAST, Task
from hyperadapt import HyperAdapterConfig

RANK = 8
SKILLS = 8
"""LoRAs that Poly mixes."""
TARGETS = ["query", "key", "value", "dense"]
SCALE = 20.0
SHIFT = 0.2


@dataclass(frozen=True)
class Arm:
    """One way to tell yes from no.

    Attributes:
        is_hyperadapter: Whether a hypernetwork makes the adapter of each row's description; else one LoRA serves all.
        is_poly: Whether PEFT's Poly mixes some LoRAs for each trained task, which is told by its number; there is no
            answer to others.
        head: ``"logits"``: two, the same for all tasks; ``"match"``: by the cosine of text and description.
        reads: Whether the description stands behind the text, in the input.
        fields: Of the hyperadapter's configuration.
        vectors: Given the vectors of the trained descriptions, what changes all before the hypernetwork reads them.
        smoothing: Of the labels.
        alone: Share of the steps, the first ones, in which concepts stand alone: as long as a contrary looks like its
            concept, with the opposite answers, some arms learn nothing of either.
    """

    is_hyperadapter: bool = False
    is_poly: bool = False
    head: str = "logits"
    reads: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    vectors: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    smoothing: float = 0.0
    alone: float = 0.75


def centring(trained: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes from vectors what the trained ones have in common."""
    mean = trained.mean(0)
    return lambda vectors: vectors - mean


def whitening(trained: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives vectors the same mean square in all directions, as far as it is above the trained ones' variance."""
    values, directions = torch.linalg.eigh(trained.T @ trained / len(trained))
    scales = (values.clamp(min=0) + trained.var(0, correction=0).mean()).rsqrt()
    matrix = (directions * scales) @ directions.T
    return lambda vectors: vectors @ matrix


WIDTH = {"hypernetwork_dim": 64}
HYPER = Arm(is_hyperadapter=True, fields=WIDTH)
# MiniLM's vectors of descriptions and the states that its layers read are of one space and one size.
BILINEAR = Arm(is_hyperadapter=True, fields={"conditioning": "bilinear", "task_embedding_dim": 384}, alone=0.0)
ARMS: dict[str, Arm] = {
    "hyperadapter, bilinear": BILINEAR,
    "hyperadapter": HYPER,
    "hyperadapter, whitened": replace(HYPER, vectors=whitening),
    "lora": Arm(),
    "bi-encoder": Arm(head="match"),
    "hyperadapter in bi-encoder": replace(HYPER, head="match"),
    "bilinear in bi-encoder": replace(BILINEAR, head="match"),
    "cross-encoder": Arm(reads=True),
    "poly": Arm(is_poly=True),
}
VARIANTS: dict[str, Arm] = {
    "width 64": replace(BILINEAR, fields=BILINEAR.fields | WIDTH),
    "soft_frobenius": replace(BILINEAR, fields=BILINEAR.fields | {"normalization": "soft_frobenius"}),
    "centred": replace(BILINEAR, vectors=centring),
    "smoothing 0.1": replace(BILINEAR, smoothing=0.1),
    "compositions in the last quarter": replace(BILINEAR, alone=0.75),
    "no compositions": replace(BILINEAR, alone=1.0),
}
"""The arm "hyperadapter, bilinear" with one thing changed."""


class TwoLogits(nn.Module):
    """No and yes from a text's vector, the same for all tasks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2)

    def forward(self, vector: Tensor, about: Tensor | None) -> Tensor:
        """Logits ``(batch, 2)``."""
        logits: Tensor = self.linear(layer_norm(vector, vector.shape[-1:]))
        return logits


class Match(nn.Module):
    """No and yes from the cosine of a text's vector with that of a description."""

    def __init__(self) -> None:
        super().__init__()
        # Learned in units of where they start, so that one learning rate suits all.
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, vector: Tensor, about: Tensor | None) -> Tensor:
        """Logits ``(batch, 2)``."""
        assert about is not None
        cosine = (normalize(vector, dim=-1) * normalize(about, dim=-1)).sum(-1)
        logit = SCALE * self.scale * (cosine - SHIFT * self.shift)
        return torch.stack([-logit / 2, logit / 2], dim=-1)


class ConceptReader(BertPreTrainedModel):
    """The upper layers of an encoder, and a head for yes or no."""

    def __init__(self, bert: BertModel, head: str) -> None:
        super().__init__(bert.config)
        self.bert = bert
        self.head = TwoLogits(bert.config.hidden_size) if head == "logits" else Match()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        about: Tensor | None = None,
        about_states: Tensor | None = None,
        about_mask: Tensor | None = None,
        about_rows: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> SequenceClassifierOutput:
        """Logits ``(batch, 2)`` and the loss, from the lower layers' states.

        What it is about is given as vectors ``(batch, hidden_size)``; or as states, which are adapted, too, and of
        which each row has one.
        """
        vector = self._vector(input_ids, attention_mask)
        if about_states is not None:
            about = self._vector(about_states, about_mask)[about_rows]
        logits = self.head(vector, about)
        loss = None if labels is None else cross_entropy(logits, labels, label_smoothing=smoothing)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _vector(self, states: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return pooled(self.bert(states, mask).last_hidden_state, mask)


def build(arm: Arm, data: ConceptData, tasks: Sequence[Task], seed: int) -> PeftModel:
    """A copy of the base model with an arm's adapter for these tasks, whose weights a seed draws."""
    torch.manual_seed(seed)
    model = ConceptReader(copy.deepcopy(data.encoder.upper), arm.head)
    shared: dict[str, Any] = {"r": RANK, "target_modules": TARGETS, "modules_to_save": ["head"]}
    if arm.is_poly:
        return get_peft_model(model, PolyConfig(n_tasks=len(tasks), n_skills=SKILLS, **shared))
    shared["lora_alpha"] = RANK
    if not arm.is_hyperadapter:
        return get_peft_model(model, LoraConfig(**shared))
    config = HyperAdapterConfig(
        tasks={task.name: trained_wordings(task) for task in tasks},
        task_embedding="text",
        text_encoder=text_encoder(arm, data, tasks),
        **shared | arm.fields,
    )
    return get_peft_model(model, config)


def trained_wordings(task: Task) -> list[str]:
    """The descriptions of a task that take part in training."""
    return list(task.wordings[:-LAST])


def text_encoder(arm: Arm, data: ConceptData, tasks: Sequence[Task]) -> Callable[[list[str]], Tensor]:
    """What gives the vectors of descriptions, as the arm changes them."""
    if arm.vectors is None:
        return data.described.vectors
    change = arm.vectors(data.described.vectors([wording for task in tasks for wording in trained_wordings(task)]))
    return lambda texts: change(data.described.vectors(texts))
