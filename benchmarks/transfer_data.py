"""Data of the transfer benchmark: encoded rows, few-shot samples, and descriptions that are wrong on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import LabelMatcher, load_matcher
from examples.support.task_descriptions import DESCRIPTIONS
from examples.support.text_tasks import TextTask, load_task

MAX_LENGTH = 32
BLANK = "-"
UNRELATED = (
    "The kettle has been on the stove for ten minutes.",
    "A violin has four strings, tuned in fifths.",
    "Water the tomatoes early in the morning.",
    "The ferry to the island leaves at noon from the north pier.",
    "Granite forms when magma cools slowly below the surface.",
    "She folded the blue blanket and put it on the chair.",
    "Add two spoons of flour and stir until the sauce thickens.",
    "Most owls hunt at night and sleep in hollow trees.",
    "lantern quarry velvet nine umbrella drift",
    "copper ladder sideways moss fourteen pillow",
    "Please close the garden gate behind you.",
    "The tunnel through the mountain is seven kilometres long.",
    "walnut orbit gently brick harbour seldom",
    "Three sheep stood in the shade of the barn.",
    "Turn left at the bakery, then follow the river.",
)


@dataclass(frozen=True)
class TransferData:
    """Rows of all tasks, encoded.

    Attributes:
        tasks: Trained tasks, then held-out ones; class and task ids count through them.
        trained: Names of the trained tasks.
        held_out: Names of the tasks that are never trained.
        tokenizer: MiniLM's tokenizer.
        train: Task name -> encoded training rows, of all tasks.
        test: Task name -> test batches.
        majority: Task name -> test accuracy of the training rows' most frequent class.
    """

    tasks: list[TextTask]
    trained: list[str]
    held_out: list[str]
    tokenizer: PreTrainedTokenizerBase
    train: dict[str, Dataset]
    test: dict[str, list[dict[str, Tensor]]]
    majority: dict[str, float]

    def load_base(self) -> LabelMatcher:
        """The base model of all arms, its encoder in bfloat16."""
        return load_matcher(self.tasks, self.tokenizer, torch.bfloat16)

    def examples(self, name: str, count: int, seed: int) -> Dataset:
        """Labelled examples of a task, as they fall; a larger sample contains the smaller ones of its seed.

        Args:
            name: The task.
            count: Number of examples.
            seed: Chooses them.

        Returns:
            Training rows.
        """
        order = np.random.default_rng(seed).permutation(len(self.train[name]))
        return self.train[name].select(order[:count])


def load_data(
    trained: Sequence[str], held_out: Sequence[str], *, rows: int, test_rows: int, split: str = "test"
) -> TransferData:
    """Read and encode the tasks.

    Args:
        trained: Names of the trained tasks.
        held_out: Names of the other ones.
        rows: Training rows per task at most.
        test_rows: Test rows per task at most.
        split: ``"test"``, or ``"validation"`` to choose settings on.

    Returns:
        The data.
    """
    tasks = [load_task(name) for name in (*trained, *held_out)]
    tokenizer = load_tokenizer()
    train, test = (
        {task.name: data.remove_columns("tasks") for task, data in zip(tasks, encoded, strict=True)}
        for encoded in (
            encode(tasks, "train", tokenizer, max_rows=rows, max_length=MAX_LENGTH),
            encode(tasks, split, tokenizer, max_rows=test_rows, max_length=MAX_LENGTH),
        )
    )
    majority = {}
    for name in test:
        [(label, _)] = Counter(train[name]["labels"]).most_common(1)
        majority[name] = float(np.mean(np.asarray(test[name]["labels"]) == label))
    batched = {name: list(batches(data, tokenizer)) for name, data in test.items()}
    return TransferData(tasks, list(trained), list(held_out), tokenizer, train, batched, majority)


def descriptions_for(names: Sequence[str], held_out: Sequence[str], seed: int) -> dict[str, dict[str, str]]:
    """What the hypernetwork is told of each held-out task.

    The seed chooses the wording, so that intervals over seeds cover it, too.

    Args:
        names: All tasks.
        held_out: The held-out ones among them.
        seed: Chooses wording, derangement and unrelated text.

    Returns:
        Kind (``"true"``, ``"shuffled"``, ``"random"``, ``"blank"``) -> task -> description.
    """
    generator = np.random.default_rng([seed, len(names)])
    # A random cycle through all tasks has no fixed point.
    cycle = [names[index] for index in generator.permutation(len(names))]
    other = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    unrelated = generator.permutation(UNRELATED)[: len(held_out)]
    return {
        "true": {name: _wording(name, seed) for name in held_out},
        "shuffled": {name: _wording(other[name], seed) for name in held_out},
        "random": {name: str(text) for name, text in zip(held_out, unrelated, strict=True)},
        "blank": dict.fromkeys(held_out, BLANK),
    }


def _wording(name: str, seed: int) -> str:
    return DESCRIPTIONS[name][seed % len(DESCRIPTIONS[name])]
