"""Everything one adapter learns: task embeddings, the hypernetwork, and the gains of its normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapt.config import BOUNDED_NORMALIZATIONS, HyperAdapterConfig
from hyperadapt.factors import Factors
from hyperadapt.hypernetwork import Hypernetwork
from hyperadapt.normalization import core_from_grams, gram_matrices
from hyperadapt.positions import Position
from hyperadapt.tasks import TaskEmbedding


class HyperAdapterNetwork(nn.Module):
    """Generates the normalised adapters of one PEFT adapter name for any of its tasks.

    Args:
        config: The adapter's configuration.
        positions: The adapted modules.
        base_norms: Frobenius norm of each position's base weight, shape ``(positions,)``, float32. Kept
            with the adapter, so that bounds and gains mean the same on a quantised or merged base.
    """

    base_norms: Tensor

    def __init__(self, config: HyperAdapterConfig, positions: Sequence[Position], base_norms: Tensor) -> None:
        super().__init__()
        self.config = config
        self.positions = list(positions)
        self._index = {position.name: index for index, position in enumerate(self.positions)}
        self.task_embedding = TaskEmbedding(len(config.tasks), config.task_embedding_dim)
        self.hypernetwork = Hypernetwork(
            self.positions,
            r=config.r,
            task_embedding_dim=config.task_embedding_dim,
            hypernetwork_dim=config.hypernetwork_dim,
            hypernetwork_depth=config.hypernetwork_depth,
            head=config.head,
            zero_head=config.has_zero_heads,
        )
        self.register_buffer("base_norms", base_norms)
        if config.has_gain:
            start = torch.zeros if config.init_weights else torch.ones
            self.gain = nn.Parameter(start(len(self.positions)))

    def forward(self, task_embeddings: Tensor, positions: Sequence[Position] | None = None) -> dict[str, Factors]:
        """Generate and normalise adapters.

        Runs in the network's own dtype also under autocast: it is a small share of the work, and the
        factors and their Gram matrices deserve the precision.

        Args:
            task_embeddings: Shape ``(tasks, task_embedding_dim)``.
            positions: The positions to generate; None for all.

        Returns:
            Factors of each position by its name.
        """
        positions = self.positions if positions is None else positions
        with torch.autocast(task_embeddings.device.type, enabled=False):
            generated = self.hypernetwork(task_embeddings, positions)
            grams = [gram_matrices(lora_A, lora_B) for _, lora_A, lora_B in generated]
            order = [position for members, _, _ in generated for position in members]
            cores = self._cores(
                torch.cat([gram_A for gram_A, _ in grams], dim=1),
                torch.cat([gram_B for _, gram_B in grams], dim=1),
                order,
            )
        factors = (
            (lora_A, lora_B)
            for _, group_A, group_B in generated
            # Taking single positions with `unbind` has one backward for all; indexing would make a
            # gradient of the size of the whole group for each.
            for lora_A, lora_B in zip(group_A.unbind(1), group_B.unbind(1), strict=True)
        )
        return {
            position.name: Factors(lora_A, lora_B, core.to(lora_A.dtype))
            for position, (lora_A, lora_B), core in zip(order, factors, cores.unbind(1), strict=True)
        }

    def _cores(self, gram_A: Tensor, gram_B: Tensor, positions: Sequence[Position]) -> Tensor:
        """Cores of shape (tasks, positions, r, r): normalisation of the scaled update, then scaling or gain."""
        method, scaling = self.config.normalization, self.config.scaling
        indices = [self._index[position.name] for position in positions]
        base_norms = self.base_norms[indices].to(gram_A.dtype)
        if method in BOUNDED_NORMALIZATIONS:
            # The bound holds for the update as applied, so the scaling goes in before it.
            assert self.config.normalization_bound is not None
            bound = self.config.normalization_bound * base_norms
            return scaling * core_from_grams(gram_A, gram_B * scaling**2, method, bound=bound)
        core = core_from_grams(gram_A, gram_B, method)
        if not self.config.has_gain:
            return scaling * core
        return (self.gain[indices].to(gram_A.dtype) * base_norms)[:, None, None] * core
