"""Labelled examples as a task's condition: the rows that are kept of each task, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from hyperadapt.tables import Tables

# Examples that are read at once, at most; training draws from 1 to so many.
MAX_EXAMPLES = 32


class ExampleEncoder(nn.Module):
    """From the vectors of a task's examples to its embedding, whatever their order.

    The vector of a row holds its features and its answer: its class, one-hot, or features of its completion
    (``classes`` is None). A row's features are projected, multiplied by a projection of its answer and shifted by
    another, so that other answers make another embedding. A residual layer follows, and the mean over rows, to which
    every class counts the same. Features are centred and scaled by those of the first tasks' rows.

    Where ``is_direct``, and rows with classes have features of the size of an embedding, all this is added to the
    contrast of the classes' means in the space of the features, and starts at zero: of two classes, the embedding
    starts as the mean of the second less that of the first, without the part of it that points to the middle between
    them. A row that is near to the one is then told from one that is near to the other as in a prototypical network
    (Snell et al., NeurIPS 2017), with nothing to learn.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int, classes: int | None, task_embedding_dim: int, is_direct: bool = False) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        answer = dim if classes is None else classes
        self.row_projection = nn.Linear(dim, task_embedding_dim, bias=False)
        self.answer_projection = nn.Linear(answer, 2 * task_embedding_dim, bias=False)
        self.expand = nn.Linear(task_embedding_dim, 2 * task_embedding_dim)
        self.contract = nn.Linear(2 * task_embedding_dim, task_embedding_dim)
        self.readout = nn.Linear(task_embedding_dim, task_embedding_dim, bias=False)
        # Of inputs with root mean square 1, they then make outputs with the same; of a class, it is one column.
        nn.init.normal_(self.row_projection.weight, std=dim**-0.5)
        nn.init.normal_(self.answer_projection.weight, std=dim**-0.5 if classes is None else 1.0)
        nn.init.normal_(self.readout.weight, std=task_embedding_dim**-0.5)
        self.register_parameter("contrast", None)
        if is_direct and classes is not None and dim == task_embedding_dim:
            nn.init.zeros_(self.readout.weight)
            self.contrast = nn.Parameter(torch.linspace(-1.0, 1.0, classes))
            self.entry_scales = nn.Parameter(torch.ones(dim))
        self.register_buffer("mean", torch.zeros(dim + answer))
        self.register_buffer("deviation", torch.ones(dim + answer))

    @property
    def size(self) -> int:
        """Size of a row's vector."""
        return len(self.mean)

    def fit_scales(self, raw: Tensor) -> None:
        """Centre and scale features from now on by those of some rows, ``(rows, size)``."""
        deviation, mean = torch.std_mean(raw, 0, correction=0)
        # What is the same in all rows says nothing.
        deviation[deviation < 1e-6] = 1.0
        if self.classes is not None:
            mean[self.dim :], deviation[self.dim :] = 0.0, 1.0
        self.mean, self.deviation = mean.to(self.mean), deviation.to(self.deviation)

    def take_scales(self, other: ExampleEncoder) -> None:
        """Centre and scale features as another encoder does."""
        self.mean, self.deviation = other.mean.clone(), other.deviation.clone()

    def scaled(self, raw: Tensor) -> Tensor:
        """Vectors ``(rows, size)`` whose features are centred and have root mean square 1; float32."""
        scaled = (raw.to(self.mean) - self.mean) / self.deviation
        row, answer = scaled[:, : self.dim], scaled[:, self.dim :]
        answer = answer if self.classes is not None else rms_norm(answer, answer.shape[-1:])
        return torch.cat([rms_norm(row, row.shape[-1:]), answer], 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Embeddings ``(n, task_embedding_dim)`` of scaled vectors ``(n, rows, size)``; rows of zeros are none."""
        vectors = vectors.to(self.readout.weight.dtype)
        row, answer = vectors[..., : self.dim], vectors[..., self.dim :]
        scale, shift = self.answer_projection(answer).chunk(2, -1)
        hidden = self.row_projection(row) * scale + shift
        hidden = hidden + self.contract(gelu(self.expand(rms_norm(hidden, hidden.shape[-1:]))))
        weights = self._weights(answer)[..., None]
        mean = (hidden * weights).sum(1)
        embeddings: Tensor = self.readout(rms_norm(mean, mean.shape[-1:]))
        if self.contrast is None:
            return embeddings
        # In the features' own space, of which the mean is a part.
        deviation = self.deviation[: self.dim].to(row)
        middle = self.mean[: self.dim].to(row) + (row * weights).sum(1) * deviation
        contrast = (row * weights * (answer @ self.contrast)[..., None]).sum(1) * deviation
        contrast = self.entry_scales * rms_norm(contrast, contrast.shape[-1:])
        # A row of A has no threshold: what lies in the middle is worth zero where it is at a right angle to the row.
        middle = rms_norm(middle, middle.shape[-1:])
        return embeddings + contrast - (contrast * middle).mean(-1, keepdim=True) * middle

    def _weights(self, answer: Tensor) -> Tensor:
        """Of each row ``(n, rows)``: with the sum 1, and the same for all rows of a class and for all classes."""
        weights = answer.ne(0).any(-1).to(answer.dtype)
        if self.classes is not None:
            weights = weights / (answer @ answer.mT).sum(-1).clamp(min=1)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1)


class ExampleRows(nn.Module):
    """The examples of the tasks that have some, as scaled vectors.

    ``vectors`` ``(tasks, MAX_EXAMPLES, size)`` are saved, and are a task's condition outside of training; zeros where a
    task has fewer. ``bank`` ``(rows, size)``, from which training draws, holds all that were given, ordered by task and
    class; of a loaded adapter what was saved.
    """

    vectors: Tensor
    bank: Tensor

    def __init__(self, tasks: int, size: int, classes: int | None) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("vectors", torch.zeros(tasks, MAX_EXAMPLES, size))
        self.register_buffer("bank", torch.zeros(0, size), persistent=False)
        # Whether there are rows to read, and whether the bank holds more than what was saved.
        self.is_filled = self.is_given = False
        self._rows_of_task = tasks * [0]
        self._tables = Tables()

    def fill(self, vectors: Tensor, banks: Sequence[Tensor], is_given: bool) -> None:
        """Take what is read outside of training, and of each task the rows ``(rows, size)`` to draw from."""
        self._rows_of_task = [len(bank) for bank in banks]
        self.vectors, self.is_filled, self.is_given = vectors, all(self._rows_of_task), is_given
        groups = [self._by_class(bank) for bank in banks]
        self.bank = torch.cat([group for of_task in groups for group in of_task])
        # Each class of a task is a group.
        self._size = tuple(len(group) for of_task in groups for group in of_task)
        self._groups = tuple(len(of_task) for of_task in groups)
        self._start, self._first = (
            tuple(end - size for end, size in zip(accumulate(sizes), sizes, strict=True))
            for sizes in (self._size, self._groups)
        )

    def take(self, other: ExampleRows) -> None:
        """Copy the rows of others, for equally many tasks."""
        vectors, banks = zip(*other.parts(), strict=True)
        self.fill(torch.stack(vectors), banks, other.is_given)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Of each task what is read outside of training, and the rows to draw from."""
        return list(zip(self.vectors, torch.split(self.bank, self._rows_of_task), strict=True))

    def kept(self, rows: Tensor) -> Tensor:
        """Of a task's rows those to read outside of training, ``(MAX_EXAMPLES, size)``: of each class equally many."""
        groups = self._by_class(rows)
        longest = max(map(len, groups))
        chosen = [group[index] for index in range(longest) for group in groups if index < len(group)][:MAX_EXAMPLES]
        return torch.cat([torch.stack(chosen), rows.new_zeros(MAX_EXAMPLES - len(chosen), rows.shape[1])])

    def drawn(self, places: Tensor) -> Tensor:
        """Random rows ``(n, MAX_EXAMPLES, size)`` of tasks ``(n,)``, of each class where there is room; and zeros."""
        first, groups = self._of(self._first, places), self._of(self._groups, places)
        fewest = groups.clamp(max=MAX_EXAMPLES)
        count = fewest + _below(MAX_EXAMPLES + 1 - fewest)
        slots = torch.arange(MAX_EXAMPLES, device=places.device)
        # Slots take turns among the classes, and begin anywhere.
        group = first[:, None] + (_below(groups)[:, None] + slots) % groups[:, None]
        rows = self._of(self._start, group) + _below(self._of(self._size, group))
        return torch.where((slots < count[:, None])[..., None], self.bank[rows], 0.0)

    def _of(self, numbers: tuple[int, ...], indices: Tensor) -> Tensor:
        """The numbers at indices, on their device."""
        return self._tables.table(numbers, indices.device)[indices]

    def _by_class(self, rows: Tensor) -> list[Tensor]:
        """The rows of each class that a task has, in their order; all of them where there are no classes."""
        if self.classes is None:
            return [rows]
        classes = rows[:, -self.classes :].argmax(-1)
        return [rows[classes == one] for one in torch.unique(classes)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Rows that were given are more, and stay; an adapter may have been saved before it had any.
        if f"{prefix}vectors" in state_dict and not self.is_given and self.vectors.flatten(1).any(1).all():
            self.fill(self.vectors, [rows[rows.any(1)] for rows in self.vectors], is_given=False)


def _below(limits: Tensor) -> Tensor:
    """Random integers from 0 to below the limits, of their shape."""
    # The product may be rounded up to the limit.
    return (torch.rand(limits.shape, device=limits.device) * limits).long().minimum(limits - 1)
