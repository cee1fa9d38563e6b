"""Text tasks encoded for MiniLM, with one classifier for the classes of all of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, EvalPrediction

from examples.support.encoder import encode, label_offsets, load_tokenizer, predict_logits, predict_own_class
from examples.support.text_tasks import load_task
from hyperadapt.trainer import concatenate_tasks


class TextData:
    """Some tasks; `data["train"]` is a data set per task, with its own classes among those of all tasks.

    Args:
        names: Names of the tasks.
        max_length: Tokens to keep per row.
        **rows: Split -> rows to keep per task.
    """

    def __init__(self, names: Sequence[str], max_length: int, **rows: int) -> None:
        # When the reading began, for the seconds that the examples print.
        self.started = time.monotonic()
        self.tasks = [load_task(name) for name in names]
        self.max_length, self.rows = max_length, rows
        self.tokenizer = load_tokenizer()
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.offsets = label_offsets(self.tasks)
        self.num_labels = self.offsets[-1]
        self.descriptions = {task.name: task.description for task in self.tasks}
        self._splits = {split: self._encoded(split, count) for split, count in rows.items()}

    def _encoded(self, split: str, max_rows: int) -> dict[str, Dataset]:
        encoded = encode(self.tasks, split, self.tokenizer, max_rows=max_rows, max_length=self.max_length)
        return {name: rows.remove_columns("tasks") for name, rows in zip(self.descriptions, encoded, strict=True)}

    def __getitem__(self, split: str) -> dict[str, Dataset]:
        return self._splits[split]

    def mixed(self, split: str) -> Dataset:
        """One split of all tasks, with the column `tasks` that the model reads."""
        return concatenate_tasks(self[split], list(self.descriptions))

    def own_class(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Class ids predicted where each row competes only among its own task's classes, shape (rows,)."""
        return predict_own_class(logits, labels, self.offsets)

    def accuracies(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of each task and their mean, from class ids."""
        right = prediction.predictions == prediction.label_ids
        ends = torch.tensor(self.offsets[1:])
        tasks = torch.bucketize(torch.as_tensor(prediction.label_ids), ends, right=True).numpy()
        scores = {name: float(right[tasks == index].mean()) for index, name in enumerate(self.descriptions)}
        return scores | {"mean": sum(scores.values()) / len(scores)}

    def predict(self, model: nn.Module) -> dict[str, Tensor]:
        """Logits of the test rows of each task, shape (rows, num_labels)."""
        logits = {}
        for name, rows in self["test"].items():
            # One task at a time, as it is tested again from a file.
            with_tasks = concatenate_tasks({name: rows}, list(self.descriptions))
            logits[name] = predict_logits(model, with_tasks, self.tokenizer)
        return logits

    def test_accuracies(self, logits: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracies from logits of the test rows."""
        labels = torch.tensor([label for rows in self["test"].values() for label in rows["labels"]])
        classes = self.own_class(torch.cat(list(logits.values())), labels)
        return self.accuracies(EvalPrediction(classes.numpy(), labels.numpy()))

    def majority(self) -> dict[str, float]:
        """Test accuracy of always answering the training rows' most frequent class."""
        result = {}
        for task in self.tasks:
            [(label, _)] = Counter(task.train["label"]).most_common(1)
            labels = task.test["label"][: self.rows["test"]]
            result[task.name] = sum(other == label for other in labels) / len(labels)
        return result
