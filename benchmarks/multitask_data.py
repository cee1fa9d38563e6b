"""Data and base model of the multi-task benchmark: rows with the lower layers' output in place of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.stability_runs import split_encoder
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import TASK_NAMES, load_task

MAX_LENGTH = 24
BATCH_SIZE = 16

Batch = dict[str, Tensor]


class Row(NamedTuple):
    """One row.

    Args:
        states: Output of the lower layers, shape ``(length, hidden_size)``, bfloat16.
        label: Class id among those of all tasks.
        task: Task id.
    """

    states: Tensor
    label: int
    task: int


class MultitaskData:
    """Rows of all tasks, and the base model that reads them.

    Args:
        tasks: Names of the tasks; class and task ids count through them.
        train_rows: Training rows per task.
        validation_rows: Validation rows per task.
        test_rows: Test rows per task.

    Attributes:
        tasks: Names of the tasks.
        train: Training rows of each task.
        validation: Batches of each task.
        test: Batches of each task.
        base: The upper layers, with a bfloat16 encoder; see ``split_encoder``.
    """

    def __init__(
        self,
        tasks: Sequence[str] = TASK_NAMES,
        *,
        train_rows: int = 640,
        validation_rows: int = 60,
        test_rows: int = 250,
    ) -> None:
        self.tasks = list(tasks)
        loaded, self._tokenizer = [load_task(name) for name in tasks], load_tokenizer()
        self.base = load_matcher(loaded, self._tokenizer, torch.bfloat16)
        self._lower = split_encoder(self.base)
        counts = {"train": train_rows, "validation": validation_rows, "test": test_rows}
        rows = {
            split: [
                [row for batch in batches(encoded, self._tokenizer) for row in self._rows(batch)]
                for encoded in encode(loaded, split, self._tokenizer, max_rows=count, max_length=MAX_LENGTH)
            ]
            for split, count in counts.items()
        }
        self.train = rows["train"]
        self.validation, self.test = (
            [list(in_batches(members, 64)) for members in rows[split]] for split in ("validation", "test")
        )

    def training_batches(self, fraction: float, steps: int, seed: int, task: int | None = None) -> Iterator[Batch]:
        """Random batches; tasks have equal shares of an epoch.

        Args:
            fraction: Share of the training rows, the same rows for a seed whatever the arm.
            steps: How many batches.
            seed: Of the choice and the order.
            task: The only task, by its id; None for all.

        Yields:
            Batches.
        """
        chosen = []
        for index, rows in enumerate(self.train):
            order = np.random.default_rng((seed, index)).permutation(len(rows))[: round(fraction * len(rows))]
            if task in (None, index):
                chosen += [rows[place] for place in order]
        random = np.random.default_rng((seed, len(self.train)))
        order = np.concatenate([random.permutation(len(chosen)) for _ in range(steps * BATCH_SIZE // len(chosen) + 1)])
        yield from in_batches([chosen[place] for place in order[: steps * BATCH_SIZE]], BATCH_SIZE)

    @torch.no_grad()
    def _rows(self, batch: Batch) -> list[Row]:
        mask = batch["attention_mask"]
        states = self._lower(batch["input_ids"], mask, batch["token_type_ids"]).last_hidden_state
        lengths, labels, tasks = mask.sum(1).tolist(), batch["labels"].tolist(), batch["tasks"].tolist()
        return [
            # A clone, since a slice would keep the padded batch in memory.
            Row(row[:length].clone(), label, task)
            for row, length, label, task in zip(states, lengths, labels, tasks, strict=True)
        ]


def in_batches(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Pad rows to batches, in order.

    Args:
        rows: Rows.
        size: Rows of a batch.

    Yields:
        Batches with ``tasks``.
    """
    for start in range(0, len(rows), size):
        members = rows[start : start + size]
        lengths = torch.tensor([len(row.states) for row in members])
        yield {
            "input_ids": pad_sequence([row.states for row in members], batch_first=True),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": torch.tensor([row.label for row in members]),
            "tasks": torch.tensor([row.task for row in members]),
        }
