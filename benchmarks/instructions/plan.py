"""What is left of the instruction study: its stages, the runs without a row, and the rates that validation chose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common.resumable import Runs
from benchmarks.common.rows import Row
from benchmarks.instructions.arms import VARIANTS
from benchmarks.instructions.data import Size
from benchmarks.instructions.evaluation import TRUE, Amount
from benchmarks.instructions.shots import BY_EXAMPLES, FRESH, PROMPT, WARM, Shots

OURS, LORA, TOLD, BASE = "hyperadapter", "lora", "lora, told", "base model, told"
WHITENED, LONGER = "hyperadapter, whitened", "hyperadapter, twice the steps"
ALL = 0
"""In the place of a number of trained tasks: all of them."""
STAGES = ("tune", "ablate", "test", "curve", "shots")
CHOOSING_SEED = 0


class Run(NamedTuple):
    """One run; the number of trained tasks may be ``ALL``."""

    stage: str
    arm: str
    rate: float
    tasks: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """What a study has: its size, and the runs of its stages.

    Attributes:
        size: What is read.
        amount: What is trained and evaluated, but for the stages that choose.
        choosing: The same for them.
        arms: By importance, with the learning rates to choose from; without any, it has that of another arm.
        shots: What is done with examples of the held-out tasks, but for the stage that chooses.
        choosing_shots: The same for it.
        shot_arms: Those that see examples, likewise.
        variants: Names of what is changed of our arm.
        seeds: Of all stages but those that choose.
        curve: Numbers of trained tasks.
    """

    size: Size = field(default_factory=Size)
    amount: Amount = field(default_factory=lambda: Amount(steps=1000))
    choosing: Amount = field(default_factory=lambda: Amount(steps=250))
    arms: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            OURS: (5e-3, 1e-2),
            WHITENED: (5e-3, 1e-2),
            LONGER: (),
            TOLD: (5e-3, 1e-2),
            LORA: (5e-3, 1e-2),
            BASE: (0.0,),
        }
    )
    shots: Shots = field(default_factory=Shots)
    choosing_shots: Shots = field(default_factory=lambda: Shots(counts=(16,), tasks=6))
    shot_arms: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            BY_EXAMPLES: (5e-3, 1e-2),
            WARM: (1e-3, 3e-3),
            FRESH: (3e-3, 1e-2),
            PROMPT: (0.0,),
        }
    )
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    curve: tuple[int, ...] = (8, 16, 32, 64, 256)

    @property
    def definition(self) -> str:
        """Short name of what rows must have in common."""
        return hashlib.sha256(
            repr((self.size, self.amount, self.choosing, self.shots, self.choosing_shots)).encode()
        ).hexdigest()[:8]


class Study(Runs[Run]):
    """A folder with a file of rows."""

    def __init__(self, folder: Path, settings: Settings, rate: float | None = None) -> None:
        super().__init__(folder / "rows.jsonl", settings.definition, Run)
        self.folder, self.settings, self._rate = folder, settings, rate
        self._rates = settings.arms | settings.shot_arms

    def rate(self, arm: str) -> float:
        """The given learning rate, or the one that answers most validation tasks; if none does, of the least loss."""
        arm = WHITENED if arm == LONGER else arm
        rates = self._rates[arm]
        if len(rates) == 1:
            return rates[0]
        if self._rate is not None:
            return self._rate
        found = {row["rate"]: measured(row) for row in self.rows() if row["stage"] == "tune" and row["arm"] == arm}
        if missing := [rate for rate in rates if rate not in found]:
            raise SystemExit(f"{arm} has no runs to choose its rate from at {missing}. Run --stage tune first.")
        return max(rates, key=lambda rate: (round(found[rate][0], 2), -found[rate][1]))

    def runs(self, stage: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """The runs of a stage; of the test, all arms of a seed come before the next one."""
        settings = self.settings
        if stage == "tune":
            chosen = [arm for arm in arms if len(self._rates[arm]) > 1]
            return [Run(stage, arm, rate, ALL, CHOOSING_SEED) for arm in chosen for rate in self._rates[arm]]
        if stage == "ablate":
            return [Run(stage, arm, self.rate(OURS), ALL, CHOOSING_SEED) for arm in settings.variants]
        if stage == "curve":
            return [Run(stage, OURS, self.rate(OURS), count, seed) for seed in seeds for count in settings.curve]
        members = settings.shot_arms if stage == "shots" else settings.arms
        return [Run(stage, arm, self.rate(arm), ALL, seed) for seed in seeds for arm in arms if arm in members]


def measured(row: Row) -> tuple[float, float]:
    """Share of exact answers and loss of the held-out tasks: by their true descriptions, or by examples."""
    scores = row["scores"]
    kinds = scores[TRUE].values() if TRUE in scores else [kind for one in scores.values() for kind in one.values()]
    exact, loss = np.mean([score for kind in kinds for score in kind.values()], axis=0)
    return float(exact), float(loss)
