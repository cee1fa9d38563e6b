"""Labels of tasks from the training data."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset
from torch import nn

from hyperadapt.config.label_fields import own_names
from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.tuner.active import find_tuner


def give_labels(model: nn.Module, dataset: Dataset) -> None:
    """Name the labels of a classifier's tasks that have none: the classes of a task's rows, by what they are called.

    The column of the labels may say that (``datasets.ClassLabel``), else the base model's ``id2label``; where neither
    does, nothing is done. The data set has the column ``tasks``.
    """
    tuner = find_tuner(model)
    column = next((name for name in ("labels", "label") if name in dataset.column_names), None)
    if column is None or len(tuner.active_adapters) != 1:
        return
    config = tuner.router.only(tuner.active_adapters)[1].config
    feature = dataset.features[column]
    if config.task_type != "SEQ_CLS" or "int" not in str(getattr(feature, "dtype", "")):
        return
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else own_names(config.base_facts)
    rows = dataset.select_columns([TASK_COLUMN, column]).with_format("numpy")
    ids, classes = rows[TASK_COLUMN][:], rows[column][:]
    for task, name in enumerate(config.tasks):
        own = np.unique(classes[ids == task]).tolist()
        if own and not config.labels_of(name) and all(output in names for output in own):
            tuner.set_labels(name, {output: names[output] for output in own})
