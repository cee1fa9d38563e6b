"""Task embeddings: learned, from text, from examples, or sums of two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import EXAMPLES, LEARNED, TEXT
from hyperadapt.normalization.precision import own_dtype
from hyperadapt.tables import Tables
from hyperadapt.tasks.examples import ExampleEncoder, ExampleRows

# How often training leaves out the learned part where a task has text too: otherwise the text would go unused, and a
# description alone would mean nothing.
TEXT_ALONE = 0.5
# Of text and examples, how often training has each of them alone, for the same reason.
EACH_ALONE = 1 / 3


# Beside entries of this size the epsilon of rms_norm is nothing, and their squares are finite.
_PLAIN_SIZES = (0.5, 128.0)


def plain_size(embeddings: Tensor) -> Tensor:
    """Embeddings ``(..., dim)`` from elsewhere, those of another size scaled, since only directions count."""
    peak = embeddings.abs().amax(-1, keepdim=True)
    smallest, largest = _PLAIN_SIZES
    is_plain = (peak >= smallest) & (peak <= largest)
    return torch.where(is_plain, embeddings, embeddings / peak.clamp(min=torch.finfo(peak.dtype).tiny))


class EntryScales(nn.Module):
    """Multiplies each entry of vectors by a number of its own, which starts at 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Same shape as ``vectors``, ``(..., dim)``."""
        return vectors * self.weight


class TaskEmbedding(nn.Module):
    """The embedding of each task: a learned vector, a projection of its description's vector, or what examples give.

    Learned vectors start as independent standard normals, so that tasks start as nearly orthogonal
    directions; the hypernetwork reads only an embedding's direction (see ``Hypernetwork``). Where a task
    has text too, its learned vector starts at zero, and training leaves it out half of the time, so that the text
    alone stands for the task as well as it can. Of several descriptions, training draws one for each forward pass; in
    evaluation their mean counts. Of examples it draws some, and in evaluation those that are kept count.
    ``num_descriptions`` is 0 for tasks without text; ``text_embedding_dim`` is None if no task has text, and
    ``example_encoder`` if none has examples. With ``is_direct``, for vectors of the size of an embedding, the
    projection only scales their entries.
    """

    text_vectors: Tensor

    def __init__(
        self,
        sources: Sequence[str],
        num_descriptions: Sequence[int],
        task_embedding_dim: int,
        text_embedding_dim: int | None = None,
        example_encoder: ExampleEncoder | None = None,
        is_direct: bool = False,
    ) -> None:
        super().__init__()
        learned, text, examples = ([source in kind for source in sources] for kind in (LEARNED, TEXT, EXAMPLES))
        self.has_text, self.has_examples = any(text), any(examples)
        if any(learned):
            start = torch.randn(sum(learned), task_embedding_dim)
            is_residual = torch.tensor(
                [source == "both" for source in sources if source in LEARNED], device=start.device
            )
            self.weight = nn.Parameter(start.masked_fill(is_residual[:, None], 0.0))
        else:
            # Without rows it would be a parameter that never gets a gradient.
            self.register_parameter("weight", None)
        # By task. They follow from the configuration, so no file should hold them.
        self._tables = Tables()
        self._is_learned, self._has_examples = tuple(learned), tuple(examples)
        self._learned_row, self._example_row = (
            tuple(max(count - 1, 0) for count in accumulate(kind)) for kind in (learned, examples)
        )
        self._has_both = tuple(source == "both" for source in sources)
        self._count = tuple(num_descriptions)
        # False until there are vectors: computed, or loaded.
        self.has_vectors = not self.has_text
        if self.has_text:
            assert text_embedding_dim is not None
            self.text_projection = _projection(text_embedding_dim, task_embedding_dim, is_direct)
            self.register_buffer("text_vectors", torch.full((sum(num_descriptions), text_embedding_dim), torch.nan))
            self._first = tuple(end - count for end, count in zip(accumulate(self._count), self._count, strict=True))
            self._most = max(num_descriptions)
        if self.has_examples:
            assert example_encoder is not None
            self.example_encoder = example_encoder
            self.example_rows = ExampleRows(sum(examples), example_encoder.size, example_encoder.classes)

    @classmethod
    def of(cls, config: HyperAdapterConfig) -> TaskEmbedding:
        """A new one for the tasks of a configuration that an adapter is made of."""
        dims, is_direct = (config.task_embedding_dim, config.text_embedding_dim), config.conditioning == "bilinear"
        encoder = None
        if config.has_examples:
            assert config.example_dim is not None
            encoder = ExampleEncoder(config.example_dim, config.example_classes, dims[0], is_direct)
        counts = [len(descriptions) for descriptions in config.embedded_descriptions]
        return cls(config.task_sources, counts, *dims, encoder, is_direct)

    @property
    def like(self) -> Tensor:
        """A parameter, for its device and dtype and whether it is trained."""
        if self.weight is not None:
            return self.weight
        return self.text_projection.weight if self.has_text else self.example_encoder.readout.weight

    def set_text_vectors(self, text_vectors: Tensor) -> None:
        """Fill in the descriptions' vectors ``(descriptions, text_embedding_dim)``, those of the first task first."""
        self.text_vectors = text_vectors.to(self.text_vectors.device)
        self.has_vectors = True

    def take_vectors(self, other: TaskEmbedding) -> None:
        """Copy the frozen vectors of another embedding of the same tasks, if it has them yet."""
        if self.has_text and other.has_vectors:
            self.set_text_vectors(other.text_vectors.clone())
        if self.has_examples and other.example_rows.is_filled:
            self.example_encoder.take_scales(other.example_encoder)
            self.example_rows.take(other.example_rows)

    def keep_float(self) -> None:
        """Have frozen vectors in float32 again, after a cast to the parameters' dtype, which would round them."""
        if self.has_text:
            self.text_vectors = self.text_vectors.float()
        if self.has_examples:
            self.example_encoder.mean, self.example_encoder.deviation = (
                self.example_encoder.mean.float(),
                self.example_encoder.deviation.float(),
            )
            self.example_rows.vectors, self.example_rows.bank = (
                self.example_rows.vectors.float(),
                self.example_rows.bank.float(),
            )

    def forward(self, task_ids: Tensor) -> Tensor:
        """Embeddings ``(n, task_embedding_dim)`` of task ids ``(n,)``, int64."""
        if not self.has_text and not self.has_examples:
            return embedding(task_ids, self.weight)
        self.check_filled()
        training = self.training and torch.is_grad_enabled()
        has_text, has_examples = self._of(self._count, task_ids) > 0, self._of(self._has_examples, task_ids)
        if self.has_text and self.has_examples and training:
            chance = torch.rand(task_ids.shape[0], device=task_ids.device)
            has_two = has_text & has_examples
            has_text = has_text & ~(has_two & (chance < EACH_ALONE))
            has_examples = has_examples & ~(has_two & (chance > 1 - EACH_ALONE))
        embeddings = torch.zeros((), device=task_ids.device)
        if self.has_text:
            text = self.project(self._vectors(task_ids, training))
            embeddings = torch.where(has_text[:, None], text, 0.0)
        if self.has_examples:
            places = self._of(self._example_row, task_ids)
            rows = self.example_rows.drawn(places) if training else self.example_rows.vectors[places]
            embeddings = embeddings + torch.where(has_examples[:, None], self._encoded(rows), 0.0)
        if self.weight is not None:
            is_learned = self._of(self._is_learned, task_ids)
            if training:
                left_out = torch.rand(task_ids.shape[0], device=task_ids.device) < TEXT_ALONE
                is_learned = is_learned & ~(left_out & self._of(self._has_both, task_ids))
            learned = embedding(self._of(self._learned_row, task_ids), self.weight)
            embeddings = embeddings + torch.where(is_learned[:, None], learned, 0.0)
        return embeddings

    def project(self, vectors: Tensor) -> Tensor:
        """Embeddings ``(..., task_embedding_dim)`` of descriptions' vectors; only their direction counts."""
        with own_dtype(vectors.device):
            vectors = rms_norm(vectors.to(self.text_projection.weight.dtype), vectors.shape[-1:])
            projected: Tensor = self.text_projection(vectors)
        return projected

    def encode(self, raw: Tensor) -> Tensor:
        """The embedding ``(task_embedding_dim,)`` of the vectors of new examples, ``(rows, size)``."""
        rows = self.example_rows.kept(self.example_encoder.scaled(raw))
        return self._encoded(rows[None])[0]

    def check_filled(self) -> None:
        """Refuse an adapter whose vectors of descriptions or examples are not there yet."""
        if not self.has_vectors:
            raise RuntimeError(
                "This adapter has no vectors of its descriptions: its configuration, with text_embedding_dim given, is "
                "that of a saved adapter, whose weights were not loaded. Load it with PeftModel.from_pretrained; or "
                "compute them anew: config.replaced(text_embedding_dim=None, text_encoder=...)."
            )
        if self.has_examples and not self.example_rows.is_filled:
            raise RuntimeError(
                "This adapter has no examples of its tasks yet, which task_embedding='examples' needs. Give them with "
                "set_examples, or train with HyperAdapterTrainer, which takes them from the training data."
            )

    def _encoded(self, rows: Tensor) -> Tensor:
        """Embeddings ``(n, task_embedding_dim)`` of scaled vectors of examples, ``(n, rows, size)``."""
        with own_dtype(rows.device):
            embeddings: Tensor = self.example_encoder(rows)
        return embeddings

    def _vectors(self, task_ids: Tensor, one: bool) -> Tensor:
        """A vector of each task's text, of one description or the sum over all; any for tasks without."""
        first, count = self._of(self._first, task_ids), self._of(self._count, task_ids)
        last = len(self.text_vectors) - 1
        if one:
            choice = (torch.rand(task_ids.shape[0], device=task_ids.device) * count).long()
            return self.text_vectors[(first + choice).clamp(max=last)]
        steps = torch.arange(self._most, device=task_ids.device)
        vectors = self.text_vectors[(first[:, None] + steps).clamp(max=last)]
        directions = rms_norm(vectors, vectors.shape[-1:])
        return torch.where((steps < count[:, None])[:, :, None], directions, 0.0).sum(1)

    def _of(self, numbers: tuple[int, ...], task_ids: Tensor) -> Tensor:
        """The numbers of tasks, on the device of their ids; of flags, flags."""
        dtype = torch.bool if isinstance(numbers[0], bool) else torch.int64
        return self._tables.table(numbers, task_ids.device, dtype)[task_ids]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.has_vectors = self.has_vectors or f"{prefix}text_vectors" in state_dict


def _projection(text_embedding_dim: int, task_embedding_dim: int, is_direct: bool) -> EntryScales | nn.Linear:
    """From vectors of descriptions to embeddings; at the start it keeps root mean square 1, which learned ones have."""
    if is_direct:
        return EntryScales(task_embedding_dim)
    projection = nn.Linear(text_embedding_dim, task_embedding_dim, bias=False)
    nn.init.normal_(projection.weight, std=text_embedding_dim**-0.5)
    return projection
