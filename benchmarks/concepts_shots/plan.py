"""What is left of the study of few texts: its stages, the runs without a row, and the rates that validation chose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.resumable import Runs
from benchmarks.concepts.data import Size
from benchmarks.concepts.evaluation import Amount, mean_scores
from benchmarks.concepts_shots.arms import ARMS, LOGISTIC

STAGES = {"tune": "validation", "test": "test"}
"""Stage -> role of its concepts."""
CHOOSING_SEED = 1


class Run(NamedTuple):
    """One run, of all concepts of a role; n is 0 where no text is needed."""

    stage: str
    seed: int
    arm: str
    n: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """What a study has.

    Attributes:
        size: What is read.
        amount: What hyperadapters are trained with, and what is evaluated.
        counts: How many texts a concept gets.
        choosing: That of the stage tune.
        measured_after: Steps of a LoRA.
        batch: Texts of a step, at most.
        trained_rate: Learning rate of the hyperadapters.
        lora_rates: To choose from.
        logistic_rates: Likewise.
        seeds: Of the test.
    """

    size: Size = field(default_factory=Size)
    amount: Amount = field(default_factory=lambda: Amount(steps=1000))
    counts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    choosing: int = 16
    measured_after: tuple[int, ...] = (10, 30)
    batch: int = 8
    trained_rate: float = 2e-3
    lora_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    logistic_rates: tuple[float, ...] = (1.0, 10.0, 100.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    @property
    def definition(self) -> str:
        """Short name of what rows must have in common."""
        parts = (self.size, self.amount, self.measured_after, self.batch, self.trained_rate)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]

    def rates(self, arm: str) -> tuple[float, ...]:
        """What an arm's learning rate is chosen from; none where nothing is learned."""
        return self.logistic_rates if arm == LOGISTIC else self.lora_rates if ARMS[arm].is_lora else ()


class Study(Runs[Run]):
    """A folder with a file of rows."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder / "shots.jsonl", settings.definition, Run)
        self.settings = settings

    def rate(self, arm: str) -> float:
        """The one with the best validation accuracy after most steps, or if that is equal, after fewer; 0 for none."""
        arm = ARMS[arm].rate_of or arm
        if not (rates := self.settings.rates(arm)):
            return 0.0
        tuned = [row for row in self.rows() if (row["stage"], row["arm"]) == ("tune", arm)]
        # Scores are rounded, so that equal means may differ in the last digits.
        found = {
            row["rate"]: [round(mean_scores(row["scores"], steps)[0], 3) for steps in reversed(row["scores"])]
            for row in tuned
        }
        if missing := [rate for rate in rates if rate not in found]:
            raise SystemExit(f"{arm} has no runs to choose its rate from at {missing}. Run --stage tune first.")
        return max(rates, key=lambda rate: found[rate])

    def runs(self, stage: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """The runs of a stage, a seed after the other."""
        if stage == "tune":
            return [
                Run(stage, CHOOSING_SEED, arm, self.settings.choosing, rate)
                for arm in arms
                if not ARMS[arm].rate_of
                for rate in self.settings.rates(arm)
            ]
        return [
            Run(stage, seed, arm, n, self.rate(arm))
            for seed in seeds
            for arm in arms
            for n in (self.settings.counts if ARMS[arm].reads_texts else (0,))
            if n >= ARMS[arm].least
        ]
