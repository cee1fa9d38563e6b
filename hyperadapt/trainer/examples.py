"""Examples of tasks from the training data, for adapters whose task embeddings come from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hyperadapt.config.task_fields import EXAMPLES
from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.tuner.active import find_tuner

# Of each task: several times what is drawn at once.
ROWS = 128


def give_examples(
    model: nn.Module, dataset: Dataset, collator: Callable[[Any], Any], seed: int, is_packed: bool = False
) -> None:
    """Give the tasks of a model's adapter that come from examples some rows of a data set, where they have none yet.

    The data set has the column ``tasks``, which the collator carries.
    """
    tuner = find_tuner(model)
    if len(tuner.active_adapters) != 1:
        return
    _, network = tuner.router.only(tuner.active_adapters)
    if not network.config.has_examples or network.task_embedding.example_rows.is_filled:
        return
    if is_packed:
        raise ValueError(
            "packing=True joins rows of the training data, but an example of a task is one row. Call set_examples on "
            "the PeftModel first, with rows of input_ids and labels and a data_collator that pads them, or leave "
            "packing off."
        )
    ids = np.asarray(dataset[TASK_COLUMN])
    sources = zip(network.config.tasks, network.config.task_sources, strict=True)
    chosen = {
        name: _rows(dataset.select(_chosen(dataset, np.flatnonzero(ids == task), seed)))
        for task, (name, source) in enumerate(sources)
        if source in EXAMPLES and (ids == task).any()
    }

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {name: value for name, value in collator(rows).items() if name != TASK_COLUMN}

    tuner.set_examples(chosen, data_collator=collate)


def _rows(dataset: Dataset) -> list[Any]:
    """Its rows as they are trained on, as far as a transform makes them; else as plain lists and numbers."""
    return list(dataset) if dataset.format["type"] == "custom" else dataset.to_list()


def _chosen(rows: Dataset, places: Any, seed: int) -> list[int]:
    """Some of the places of a task's rows, at random, of each class equally many where the rows say theirs."""
    places = np.random.default_rng(seed).permutation(places)
    label = next((name for name in ("labels", "label") if name in rows.column_names), None)
    # In the format of torch or numpy, a class is no int.
    classes = None if label is None else rows.with_format(None).select(places)[label]
    if classes and isinstance(classes[0], int):
        order = np.argsort(classes, kind="stable")
        _, starts, counts = np.unique(np.asarray(classes)[order], return_index=True, return_counts=True)
        # The how manieth of its class each row is.
        rank = np.empty(len(places), dtype=np.int64)
        rank[order] = np.arange(len(places)) - np.repeat(starts, counts)
        places = places[np.argsort(rank, kind="stable")]
    return [int(place) for place in places[:ROWS]]
