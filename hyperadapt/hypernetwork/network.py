"""Everything one adapter learns: task embeddings, the hypernetwork, and gains or bounds of its normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.hypernetwork import Generated, Hypernetwork
from hyperadapt.hypernetwork.own_factors import OwnFactors
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.hypernetwork.updates import update_grams
from hyperadapt.hypernetwork.warmup import BoundWarmup
from hyperadapt.normalization.cores import cores
from hyperadapt.normalization.formulas import METHODS, frobenius_norm_squared, learned_bound, soft_scale
from hyperadapt.normalization.matrix_functions import spectral_norm
from hyperadapt.normalization.precision import own_dtype
from hyperadapt.tables import Tables
from hyperadapt.tasks.embedding import TaskEmbedding
from hyperadapt.tasks.table import TaskTable


class HyperAdapterNetwork(nn.Module):
    """Generates the normalised adapters of one PEFT adapter name for any of its tasks.

    The Frobenius norms of the base weights, ``(weights,)``, float32, are kept with the adapter, so that bounds and
    gains mean the same on a quantised or merged base. A position has one weight, or one for each of its experts, which
    are normalised one by one.
    """

    base_norms: Tensor

    def __init__(self, config: HyperAdapterConfig, positions: Sequence[Position], base_norms: Tensor) -> None:
        super().__init__()
        config = self.config = config.with_bound(len(positions))
        self._tables = Tables()
        method = METHODS[config.normalization]
        self.positions = list(positions)
        self._index = {position.name: index for index, position in enumerate(self.positions)}
        ends = list(accumulate(position.weights for position in self.positions))
        self._weights = {one.name: range(end - one.weights, end) for one, end in zip(self.positions, ends, strict=True)}
        self.task_embedding = TaskEmbedding.of(config)
        self.hypernetwork = Hypernetwork(
            self.positions,
            task_embedding_dim=config.task_embedding_dim,
            hypernetwork_dim=config.hypernetwork_dim,
            hypernetwork_depth=config.hypernetwork_depth,
            head=config.head,
            variance_B=_start_variance(config),
            mixing="logits" in method.needs,
            conditioning=config.conditioning,
        )
        self.own_factors = OwnFactors(self.positions, config.own_task_ids)
        self.register_buffer("base_norms", base_norms)
        warmup = 1 if config.has_gain else config.normalization_options.get("warmup", 1)
        self.warmup = BoundWarmup(warmup) if warmup > 1 else None
        if self.warmup is not None and not config.init_weights:
            # A random start has its whole size at once. It counts, too, for a network of zeros to take its state.
            self.warmup.finish()
        if config.has_gain:
            start = torch.zeros if config.init_weights else torch.ones
            self.gain = nn.Parameter(start(len(self.positions)))
        if method.learns_bound:
            self.bound_logit = nn.Parameter(torch.zeros(len(self.positions)))

    def forward(
        self,
        tasks: Tensor,
        positions: Sequence[Position] | None = None,
        dtype: torch.dtype | None = None,
        *,
        is_whole: bool = False,
    ) -> dict[str, Factors]:
        """Normalised adapters by position name, of task ids ``(tasks,)`` or embeddings ``(tasks, dim)``.

        Runs in the network's own dtype also under autocast: it is a small share of the work, and the factors and their
        Gram matrices deserve the precision. ``dtype`` is that of the A and B that are returned; None for the network's
        own. In another, a core that is a matrix is part of B; with ``is_whole`` any is, and B contiguous: without
        gradients only. Factors of experts have a dimension more, after that of the tasks.
        """
        positions = self.positions if positions is None else positions
        is_trained = self.training and torch.is_grad_enabled() and self.hypernetwork.layer_embedding.requires_grad
        if self.warmup is not None and is_trained:
            self.warmup.expect_step()
        # Looked up in here, where sharded training has gathered the parameters.
        device = self.hypernetwork.layer_embedding.device
        is_known = not tasks.is_floating_point()
        moved = tasks.to(device, non_blocking=True)
        with own_dtype(device):
            task_embeddings = self.task_embedding(moved) if is_known else moved
            by_rank: dict[int, list[Generated]] = {}
            generated = self.hypernetwork(task_embeddings, positions)
            for group in self.own_factors.added_to(generated, tasks) if is_known else generated:
                by_rank.setdefault(group.positions[0].r, []).append(group)
            return {
                name: factors
                for groups in by_rank.values()
                for name, factors in self._normalized(groups, dtype, is_whole).items()
            }

    @property
    def table(self) -> TaskTable:
        """The tasks, to be changed in a copy."""
        own = {name: self.own_factors.of(place) for place, name in enumerate(self.config.own_factors or ())}
        return TaskTable(self.config, self.task_embedding, own)

    def take(self, table: TaskTable) -> None:
        """Have the tasks of a table that was made of this network's own."""
        self.config, self.task_embedding = table.config, table.embedding
        self.own_factors = OwnFactors(self.positions, table.config.own_task_ids, table.own_factors.values())

    def take_untrained(self, other: HyperAdapterNetwork) -> None:
        """Copy what training does not learn from a network of the same configuration."""
        self.task_embedding.take_vectors(other.task_embedding)
        if self.warmup is not None and other.warmup is not None:
            self.warmup.trained_steps.copy_(other.warmup.trained_steps)

    @property
    def position_norms(self) -> Tensor:
        """Frobenius norm of each position's base weights, those of its experts together, (positions,), float32."""
        parts = torch.split(self.base_norms, [position.weights for position in self.positions])
        # That of a single one would be rounded anew.
        return torch.cat([part if len(part) == 1 else torch.linalg.vector_norm(part)[None] for part in parts])

    @torch.no_grad()
    def bound_shares(self, generated: Mapping[str, Factors]) -> dict[str, Tensor]:
        """Share of its bound that each task's update has reached, ``(tasks,)`` by position name; empty without a bound.

        Dimensionless, float32 or float64. Where a gain follows, what is bounded is the gain: its share is that of all
        tasks, however much smaller than the largest norm their unit updates are. Of experts, the mean of their shares.
        """
        if "bound" not in self.config.normalization_options:
            return {}
        by_rank: dict[int, list[Position]] = {}
        for name in generated:
            position = self.positions[self._index[name]]
            by_rank.setdefault(position.r, []).append(position)
        shares: dict[str, Tensor] = {}
        for positions in by_rank.values():
            factors = [one for position in positions for one in generated[position.name].of_weights()]
            sizes = [position.weights for position in positions]
            with own_dtype(factors[0].core.device):
                parts = torch.split(self._bound_shares(positions, factors), sizes)
            shares |= {position.name: part.mean(0) for position, part in zip(positions, parts, strict=True)}
        return shares

    def _normalized(
        self, generated: Sequence[Generated], dtype: torch.dtype | None, is_whole: bool
    ) -> dict[str, Factors]:
        """Factors by position name of groups of one rank."""
        order = [position for group in generated for position in group.positions]
        joined = self._cores(generated, order).to(generated[0].lora_A.dtype)
        lora_Bs = [group.lora_B for group in generated]
        if is_whole or (dtype not in (None, joined.dtype) and joined.shape[-1] > 1):
            # Where a core brings some directions down and not others, what half precision rounds off the large ones
            # would count beside the small ones. In B·S they are of one size.
            parts = torch.split(joined, [group.weights for group in generated], dim=1)
            lora_Bs = [_with_core(lora_B, part) for lora_B, part in zip(lora_Bs, parts, strict=True)]
            joined = torch.ones_like(joined[..., :1, :1])
        group_cores = torch.split(joined, [group.weights for group in generated], dim=1)
        factors = (
            Factors(*parts)
            for group, group_B, core in zip(generated, lora_Bs, group_cores, strict=True)
            for parts in zip(
                *(group.at_positions(part.to(dtype or part.dtype)) for part in (group.lora_A, group_B)),
                group.at_positions(core),
                strict=True,
            )
        )
        return {position.name: one for position, one in zip(order, factors, strict=True)}

    def _cores(self, generated: Sequence[Generated], positions: Sequence[Position]) -> Tensor:
        """Cores (tasks, weights, r, r) of one rank: normalisation of the scaled update, then scaling or gain."""
        config, like = self.config, generated[0].lora_A
        method, dtype = METHODS[config.normalization], torch.promote_types(like.dtype, torch.float32)
        indices, base_norms = self._selected(positions, dtype)
        factors = [group.lora_A for group in generated], [group.lora_B.mT for group in generated]
        options = config.normalization_options
        options.pop("warmup", None)
        if "logits" in method.needs:
            options["logits"] = torch.cat([group.logits for group in generated if group.logits is not None], dim=1)
        if config.has_gain:
            del options["bound"]
            gains, _ = self._gains(indices, base_norms, positions[0].r)
            return gains[:, None, None] * cores(*factors, method, options)
        scaling = self._scaling(positions, base_norms)
        if method.is_bounded:
            # A bound holds for the update as applied: the norm of the scaled update against it is that of the update
            # against the bound over the scaling.
            options["bound"] = self._bounds(indices, base_norms) / scaling
        if self.warmup is not None:
            options["bound"] = options["bound"] * self.warmup(dtype)
        result = cores(*factors, method, options)
        if isinstance(scaling, Tensor):
            return scaling[:, None, None] * result
        return result if scaling == 1 else scaling * result

    def _bound_shares(self, positions: Sequence[Position], factors: Sequence[Factors]) -> Tensor:
        """As ``bound_shares``, of the weights of positions of one rank, (weights, tasks)."""
        cores = factors[0].core
        indices, base_norms = self._selected(positions, torch.promote_types(cores.dtype, torch.float32))
        if self.config.has_gain:
            gains, bounds = self._gains(indices, base_norms, positions[0].r)
            return (gains.abs() / bounds)[:, None].expand(-1, len(cores))
        gram_A, gram_B = update_grams(factors)
        if METHODS[self.config.normalization].bounds_singular_values:
            sizes = spectral_norm(gram_A, gram_B) * math.sqrt(positions[0].r)
        else:
            sizes = frobenius_norm_squared(gram_A, gram_B).sqrt()
        return sizes / self._bounds(indices, base_norms)[:, None]

    def _selected(self, positions: Sequence[Position], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For each weight of positions the place of its position among all, and its base norm, both (weights,)."""
        weights = [index for position in positions for index in self._weights[position.name]]
        indices = [self._index[position.name] for position in positions for _ in range(position.weights)]
        device = self.base_norms.device
        return self._tables.table(indices, device), self.base_norms[self._tables.table(weights, device)].to(dtype)

    def _scaling(self, positions: Sequence[Position], like: Tensor) -> float | Tensor:
        """The scaling that all positions share, or that of each weight, shape (weights,), like a tensor."""
        values = [position.scaling for position in positions for _ in range(position.weights)]
        return values[0] if len(set(values)) == 1 else self._tables.table(values, like.device, like.dtype)

    def _bounds(self, indices: Tensor, base_norms: Tensor) -> Tensor:
        """Bounds in the units of the weights, (weights,)."""
        bound = self.config.normalization_options["bound"]
        if METHODS[self.config.normalization].learns_bound:
            bound = learned_bound(bound, self.bound_logit[indices].to(base_norms))
        bounds: Tensor = bound * base_norms
        return bounds

    def _gains(self, indices: Tensor, base_norms: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Bounded gains of weights of rank r, and what bounds them, in the units of the weights, (weights,)."""
        largest_norm = METHODS[self.config.normalization].largest_norm
        assert largest_norm is not None
        # What is bounded is the gained update, whose norm is the gain's (or at most a multiple of it).
        bounds = self._bounds(indices, base_norms) / largest_norm(r)
        gains = self.gain[indices].to(base_norms) * base_norms
        return soft_scale(gains.square(), bounds) * gains, bounds


def _with_core(lora_B: Tensor, core: Tensor) -> Tensor:
    """B·S, contiguous."""
    if core.shape[-1] > 1:
        return lora_B @ core
    # B is a transposed view, and a product has the order of its factors in memory: this saves a copy.
    return torch.mul(lora_B, core, out=torch.empty(lora_B.shape, dtype=lora_B.dtype, device=lora_B.device))


def _start_variance(config: HyperAdapterConfig) -> float | None:
    """Variance of B's entries at the start; None for that which keeps the activation's."""
    if config.has_zero_heads:
        return 0.0
    # Before a unit norm only ratios count. Adam's steps are the smaller in proportion, the larger B starts: at 1 in
    # place of 1/r, rates three times as high train as well (DECISIONS.md).
    return 1.0 if config.has_gain else None
