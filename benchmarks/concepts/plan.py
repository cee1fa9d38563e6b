"""What is left of the concept study: its stages, the runs without a row, and the rates that validation chose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.resumable import Runs
from benchmarks.common.rows import Row
from benchmarks.concepts.arms import VARIANTS
from benchmarks.concepts.data import Size
from benchmarks.concepts.evaluation import TRUE, Amount, mean_scores

COSINE = "frozen cosine"
SEPARATE, POLY = "separate loras", "poly"
OURS = "hyperadapter, bilinear"
GATED = "hyperadapter"
WHITENED = "hyperadapter, whitened"
ALL = 0
"""In the place of a number of concepts: all that are trained."""


class Run(NamedTuple):
    """One run; the number of trained concepts may be ``ALL``."""

    stage: str
    arm: str
    rate: float
    concepts: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """What a study has: its size, and the runs of its stages.

    Attributes:
        size: What is read.
        amount: What is trained and evaluated, but for the stages that choose.
        choosing: The same for them.
        arms: By importance, with the learning rates to choose from.
        variants: Names of what is changed of our arm.
        seeds: Of the test, and of the curve.
        curve: Numbers of trained concepts.
        separate: Trained concepts that get a LoRA of their own.
    """

    size: Size = field(default_factory=Size)
    amount: Amount = field(default_factory=lambda: Amount(steps=1000))
    choosing: Amount = field(default_factory=lambda: Amount(steps=400))
    arms: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            OURS: (2e-3, 5e-3),
            GATED: (2e-3, 5e-3),
            WHITENED: (2e-3, 5e-3),
            COSINE: (0.0,),
            "lora": (2e-3, 5e-3),
            "hyperadapter in bi-encoder": (2e-3, 5e-3),
            "bilinear in bi-encoder": (2e-3, 5e-3),
            "bi-encoder": (2e-3, 5e-3),
            "cross-encoder": (2e-3, 5e-3),
            SEPARATE: (5e-3,),
            POLY: (5e-3,),
        }
    )
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    curve: tuple[int, ...] = (8, 16, 32, 64)
    separate: int = 20

    @property
    def definition(self) -> str:
        """Short name of what rows must have in common."""
        return hashlib.sha256(repr((self.size, self.amount, self.choosing)).encode()).hexdigest()[:8]


STAGES = ("tune", "ablate", "test", "curve")
CHOOSING_SEED = 0


class Study(Runs[Run]):
    """A folder with a file of rows."""

    def __init__(self, folder: Path, settings: Settings, rate: float | None = None) -> None:
        super().__init__(folder / "rows.jsonl", settings.definition, Run)
        self.settings, self._rate = settings, rate

    def rate(self, arm: str) -> float:
        """The given learning rate, or the one whose area under the curve is largest on validation concepts."""
        rates = self.settings.arms[arm]
        if self._rate is not None and len(rates) > 1:
            return self._rate
        if len(rates) == 1:
            return rates[0]
        areas = {row["rate"]: area(row) for row in self.rows() if row["stage"] == "tune" and row["arm"] == arm}
        if missing := [rate for rate in rates if rate not in areas]:
            raise SystemExit(f"{arm} has no runs to choose its rate from at {missing}. Run --stage tune first.")
        return max(rates, key=lambda rate: areas[rate])

    def runs(self, stage: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """The runs of a stage, an arm after the other."""
        settings = self.settings
        if stage == "tune":
            return [
                Run(stage, arm, rate, ALL, CHOOSING_SEED)
                for arm in arms
                for rate in settings.arms[arm]
                if len(settings.arms[arm]) > 1
            ]
        if stage == "ablate":
            return [Run(stage, arm, self.rate(OURS), ALL, CHOOSING_SEED) for arm in settings.variants]
        if stage == "curve":
            return [Run(stage, OURS, self.rate(OURS), count, seed) for seed in seeds for count in settings.curve]
        return [Run(stage, arm, self.rate(arm), ALL, seed) for arm in arms for seed in seeds]


def area(row: Row) -> float:
    """Mean area under the curve of the held-out concepts, each alone, by their true descriptions."""
    return mean_scores(row["scores"], TRUE)[1]
