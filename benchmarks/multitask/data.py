"""Data and base model of the multi-task benchmark: rows with the lower layers' output in place of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from benchmarks.stability.data import Batch, computed_rows, in_batches, split_encoder
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import TASK_NAMES, load_task

MAX_LENGTH = 24
BATCH_SIZE = 16


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
        loaded, tokenizer = [load_task(name) for name in tasks], load_tokenizer()
        self.base = load_matcher(loaded, tokenizer, torch.bfloat16)
        lower = split_encoder(self.base)
        counts = {"train": train_rows, "validation": validation_rows, "test": test_rows}
        rows = {
            split: [
                [row for batch in batches(encoded, tokenizer) for row in computed_rows(lower, batch)]
                for encoded in encode(loaded, split, tokenizer, max_rows=count, max_length=MAX_LENGTH)
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
