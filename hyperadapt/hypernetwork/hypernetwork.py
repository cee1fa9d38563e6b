"""The hypernetwork: from a task embedding and a position to the LoRA factors there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from hyperadapt.hypernetwork.blocks import Head, ResidualBlock
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.tables import Tables

# Sinkhorn's mixing starts close to the identity: equal logits would make it constant, and the update of rank 1.
MIXING_DIAGONAL = 4.0
# Share of the factors' variance at the start that all tasks have in common.
SHARED = 0.5


class Generated(NamedTuple):
    """Factors of the positions of one shape and rank; a tuple for the same reason as ``Factors``.

    Args:
        positions: The positions, whose weights follow one another; experts have one each.
        lora_A: Shape ``(tasks, weights, r, in_features)``.
        lora_B: Shape ``(tasks, weights, out_features, r)``, a transposed view of contiguous rows.
        logits: Mixing logits, shape ``(tasks, weights, r, r)``; None unless asked for.
    """

    positions: list[Position]
    lora_A: Tensor
    lora_B: Tensor
    logits: Tensor | None

    @property
    def weights(self) -> int:
        """Number of matrices, all positions together."""
        return self.lora_A.shape[1]

    def at_positions(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts ``(tasks, ...)`` of a tensor ``(tasks, weights, ...)``, of experts ``(tasks, experts, ...)``.

        Taking them with `unbind` has one backward for all; indexing would make a gradient of the size of the whole
        group for each.
        """
        experts = self.positions[0].experts
        return (tensor if experts is None else torch.unflatten(tensor, 1, (-1, experts))).unbind(1)


class Hypernetwork(nn.Module):
    """Generates the factors of every position for several tasks in a few batched products.

    The task embedding, the layer embedding, the module embedding (for ``head="row"`` also the
    embedding of the row within the factor, for fused experts that of the expert) are each normalised
    to root mean square 1, projected and added: the input has constant magnitude, so training cannot
    amplify the output by inflating an embedding. A trunk of pre-normalised residual blocks follows,
    and one linear head per size of output, shared by all positions with that size.

    To what the heads emit, every position adds factors of its own, which all tasks share: parameters like those of one
    LoRA. They learn what the tasks have in common as quickly as a LoRA does, without a detour through heads in which
    positions interfere (DECISIONS.md), and the heads what tells the tasks apart. The experts of a parameter share them,
    too, so that only the table of expert embeddings, which all layers use, grows with their number.

    With ``conditioning="gated"`` the trunk's output is multiplied by another projection of the task embedding, whose
    entries have a sign of their own for each task. Tasks are then nearly orthogonal to the heads, and only the shared
    factors are common to them; otherwise an embedding that is close to another gives factors that are close.

    With ``conditioning="bilinear"`` it is gated, too, and at layers that read vectors of the size of an embedding,
    the first row of A is the embedding, times scales of its entries that all tasks share: A·x compares the activation x
    with the embedding. Where embeddings are vectors of texts in the same space, a new text is compared as well as a
    known one, with nothing to learn. The row weighs as much as half of A's rows, so that a bound does not drown it.

    Source: Text-to-LoRA (arXiv 2506.06105) for the inputs and the three kinds of head;
    magnitude-invariant inputs after "Magnitude Invariant Parametrizations Improve Hypernetwork
    Learning" (ICLR 2024), here by normalising instead of encoding; gate and bilinear form are diagonal forms of the
    multiplicative interactions of Jayakumar et al. (ICLR 2020); shared factors after the bias initialisation of Beck et
    al. (2023), here for each position; initial scale see ``Head``.

    ``variance_B`` is the variance of the entries of B at the start, in squared units of the generated weight; None
    keeps the variance of the activation, 1/r. ``mixing`` asks for mixing logits too.
    """

    def __init__(
        self,
        positions: Sequence[Position],
        *,
        task_embedding_dim: int,
        hypernetwork_dim: int,
        hypernetwork_depth: int,
        head: str,
        variance_B: float | None = None,
        mixing: bool = False,
        conditioning: str = "gated",
    ) -> None:
        super().__init__()
        self.head = head
        self._tables = Tables()
        self.slots = max(position.r for position in positions) if head == "row" else 1
        layer_indices: list[int | None] = list(dict.fromkeys(position.layer_index for position in positions))
        modules = list(dict.fromkeys(position.module for position in positions))
        self._rows = {
            position.name: (layer_indices.index(position.layer_index), modules.index(position.module))
            for position in positions
        }

        self.layer_embedding = nn.Parameter(torch.randn(len(layer_indices), task_embedding_dim))
        self.module_embedding = nn.Parameter(torch.randn(len(modules), task_embedding_dim))
        names = ["task", "layer", "module"]
        if self.slots > 1:
            self.row_embedding = nn.Parameter(torch.randn(self.slots, task_embedding_dim))
            names.append("row")
        experts = max((position.experts or 0 for position in positions), default=0)
        if experts:
            self.expert_embedding = nn.Parameter(torch.randn(experts, task_embedding_dim))
            names.append("expert")
        self.is_gated = conditioning in ("gated", "bilinear")
        self._matched_size = task_embedding_dim if conditioning == "bilinear" else None
        if self._matched_size and not any(map(self._is_matched, positions)):
            sizes = sorted({one.in_features for one in positions if _reads_vectors(one)})
            raise ValueError(
                f"conditioning='bilinear' needs a linear layer that reads vectors of size task_embedding_dim="
                f"{task_embedding_dim}; the adapted ones read {', '.join(map(str, sizes)) or 'none'}. Set "
                "task_embedding_dim to the hidden size of the base model, which the vectors of descriptions need to "
                "have, too; or choose conditioning='gated'."
            )
        if self.is_gated:
            names.append("gate")
        # A sum of projections is one projection of the concatenation, without repeating each
        # embedding for every combination of task, layer, module and row.
        self.inputs = nn.ModuleDict(
            {name: nn.Linear(task_embedding_dim, hypernetwork_dim, bias=False) for name in names}
        )
        self.trunk = nn.ModuleList(ResidualBlock(hypernetwork_dim) for _ in range(hypernetwork_depth))
        self.heads = nn.ModuleDict()
        self.shared = nn.ParameterDict()
        groups: dict[str, list[Position]] = {}
        for position in positions:
            groups.setdefault(shape_name(position), []).append(position)
        self._places = {member.name: place for members in groups.values() for place, member in enumerate(members)}
        for shape, members in groups.items():
            position, r = members[0], members[0].r
            for factor, size in (("A", position.in_features), ("B", position.out_features)):
                # The factors' variances keep the variance of the activation: A reads `in_features`
                # inputs (one of an embedding), B reads r (see `Head`).
                variance = 1 / (position.fan_in or position.in_features)
                if factor == "B":
                    variance = 1 / r if variance_B is None else variance_B
                start = math.sqrt(SHARED * variance) * torch.randn(len(members), r, size)
                if factor == "A" and self._is_matched(position):
                    start[:, 0] = math.sqrt(SHARED * r * variance)
                self.shared[f"{factor}_{shape}"] = nn.Parameter(start)
                key = self._head_key(factor, position)
                if key not in self.heads:
                    outputs = size if head == "row" else r * size
                    self.heads[key] = Head(hypernetwork_dim, outputs, variance=(1 - SHARED) * variance)
        self.mixing = mixing
        for r in sorted({position.r for position in positions}) if mixing else ():
            self.heads[f"mixing_r{r}"] = Head(hypernetwork_dim, r if head == "row" else r * r, variance=0.0)

    def forward(self, task_embeddings: Tensor, positions: Sequence[Position]) -> list[Generated]:
        """One group for each shape and rank among the positions; of embeddings only the direction counts."""
        groups: dict[str, list[Position]] = {}
        for position in positions:
            groups.setdefault(shape_name(position), []).append(position)
        # In the groups' order, in which each group's part is a view.
        hidden = self._hidden(task_embeddings, [position for members in groups.values() for position in members])
        sizes = [sum(position.weights for position in members) for members in groups.values()]
        parts = torch.split(hidden, sizes, dim=1)
        generated = []
        for members, group_hidden in zip(groups.values(), parts, strict=True):
            r = members[0].r
            if r < self.slots:
                group_hidden = group_hidden[:, :, :r]
            shape = (task_embeddings.shape[0], len(members), members[0].weights, r, -1)
            lora_A, lora_B = (
                # Into what the head has emitted: of all that is computed here, memory takes longest.
                self.heads[self._head_key(factor, members[0])](group_hidden)
                .reshape(shape)
                .add_(self._shared(factor, members)[:, None])
                .flatten(1, 2)
                for factor in "AB"
            )
            if self._is_matched(members[0]):
                # The row that the head emits is left unused: it is a small part of one head.
                lora_A = torch.cat([self._matched(task_embeddings, members), lora_A[:, :, 1:]], dim=2)
            logits = None
            if self.mixing:
                diagonal = MIXING_DIAGONAL * torch.eye(r, dtype=lora_A.dtype, device=lora_A.device)
                logits = diagonal + self.heads[f"mixing_r{r}"](group_hidden).reshape(*lora_A.shape[:3], r)
            generated.append(Generated(members, lora_A, lora_B.mT, logits))
        return generated

    def _shared(self, factor: str, members: Sequence[Position]) -> Tensor:
        """What all tasks share of a factor of some positions of one shape, (positions, r, size)."""
        shared: Tensor = self.shared[f"{factor}_{shape_name(members[0])}"]
        places = [self._places[position.name] for position in members]
        return shared if places == list(range(len(shared))) else shared[self._tables.table(places, shared.device)]

    def _is_matched(self, position: Position) -> bool:
        """Whether A has a row that is made of the embedding at a position."""
        return position.in_features == self._matched_size and _reads_vectors(position)

    def _matched(self, task_embeddings: Tensor, members: Sequence[Position]) -> Tensor:
        """The first row of A where that is made of the embedding, (tasks, weights, 1, size)."""
        embeddings = task_embeddings.to(self.layer_embedding.dtype)
        directions = rms_norm(embeddings, embeddings.shape[-1:])
        rows = self._shared("A", members)[:, :1].repeat_interleave(members[0].weights, dim=0)
        return directions[:, None, None] * rows

    def _hidden(self, task_embeddings: Tensor, positions: Sequence[Position]) -> Tensor:
        """Trunk output of shape (tasks, weights, slots, hypernetwork_dim), root mean square 1."""
        rows = [self._rows[position.name] for position in positions for _ in range(position.weights)]
        layers, modules = zip(*rows, strict=True)
        device = self.layer_embedding.device
        hidden = (
            self._project("task", task_embeddings.to(self.layer_embedding.dtype))[:, None, None]
            + self._project("layer", self.layer_embedding)[self._tables.table(layers, device)][None, :, None]
            + self._project("module", self.module_embedding)[self._tables.table(modules, device)][None, :, None]
        )
        if self.slots > 1:
            hidden = hidden + self._project("row", self.row_embedding)
        if any(position.experts for position in positions):
            hidden = hidden + self._of_experts(positions)[None, :, None]
        for block in self.trunk:
            hidden = block(hidden)
        hidden = rms_norm(hidden, hidden.shape[-1:])
        if self.is_gated:
            gate = self._project("gate", task_embeddings.to(self.layer_embedding.dtype))
            hidden = rms_norm(hidden * gate[:, None, None], hidden.shape[-1:])
        return hidden

    def _of_experts(self, positions: Sequence[Position]) -> Tensor:
        """The projected embedding of each weight's expert, (weights, hypernetwork_dim); zero for other weights."""
        projected = self._project("expert", self.expert_embedding)
        nothing = len(projected)
        experts = [index for one in positions for index in (range(one.experts) if one.experts else (nothing,))]
        return nn.functional.pad(projected, (0, 0, 0, 1))[self._tables.table(experts, projected.device)]

    def _project(self, name: str, embedding: Tensor) -> Tensor:
        projected: Tensor = self.inputs[name](rms_norm(embedding, embedding.shape[-1:]))
        return projected

    def _head_key(self, factor: str, position: Position) -> str:
        if self.head == "pair":
            size = f"{position.in_features}x{position.out_features}"
        else:
            size = str(position.in_features if factor == "A" else position.out_features)
        fan_in = f"_fan{position.fan_in}" if factor == "A" and position.fan_in else ""
        return f"{factor}_{size}_r{position.r}{fan_in}"


def _reads_vectors(position: Position) -> bool:
    """Whether the inputs of a position are vectors of the model, not the indices of an embedding or patches."""
    return position.fan_in is None and position.kernel is None


def shape_name(position: Position) -> str:
    """Name of a position's shape; positions with the same name are generated together."""
    fan_in = f"_fan{position.fan_in}" if position.fan_in else ""
    experts = f"_e{position.experts}" if position.experts else ""
    return f"{position.in_features}x{position.out_features}_r{position.r}{fan_in}{experts}"
