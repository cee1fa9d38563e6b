"""What is left of the stability study: the runs without a row, how long they take, and the choices they need."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.common.rows import read_rows, save_rows
from benchmarks.stability.arms import ARMS, is_hyperadapter
from benchmarks.stability.settings import HOME, STAGES, Setting
from benchmarks.stability.summary import OURS, choose

Row = dict[str, Any]


class Run(NamedTuple):
    """One run of a setting and stage."""

    seed: int
    arm: str
    candidate: str
    rate: float


class Study:
    """A folder of rows, a file for each setting, and the choices.

    Args:
        folder: The folder; it is made.
        settings: The settings by name.
        arms: Names of the arms.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Setting], arms: Sequence[str]) -> None:
        self.folder, self.settings, self.arms = folder, settings, list(arms)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, setting: str) -> Path:
        """The file of a setting's rows."""
        return self.folder / f"{setting}.jsonl"

    @property
    def choices_path(self) -> Path:
        """The file of the choices."""
        return self.folder / "choices.jsonl"

    def rows(self, setting: str, stage: str | None = None) -> list[Row]:
        """The rows of a setting, of one stage or of both; of runs made twice by two processes, the first row."""
        definition = self.settings[setting].definition
        rows: dict[tuple[str, Run], Row] = {}
        for row in read_rows(self.path(setting)):
            if row["definition"] != definition:
                raise SystemExit(
                    f"{self.path(setting)} has rows of the setting's definition {row['definition']}, which is "
                    f"{definition} now. Choose another --output."
                )
            rows.setdefault((row["stage"], run_of(row)), row)
        return [row for (of, _), row in rows.items() if stage in (None, of)]

    def runs(self, setting: str, stage: str) -> list[Run]:
        """All runs, seed by seed; where only hypernetworks differ from another setting, those alone."""
        fields = self.settings[setting]
        arms = [arm for arm in self.arms if is_hyperadapter(arm) or not fields.hypernetwork]
        candidates = {arm: list(ARMS[arm]) for arm in arms}
        if stage == "blind":
            choices = self.choices(arms)
            candidates = {arm: [choices[arm]] for arm in arms}
        return [
            Run(seed, arm, candidate, rate)
            for seed in STAGES[stage].seeds(fields)
            for arm in arms
            for candidate, rate in itertools.product(candidates[arm], fields.rates)
        ]

    def missing(self, setting: str, stage: str) -> list[Run]:
        """The runs that have no row."""
        done = {run_of(row) for row in self.rows(setting, stage)}
        return [run for run in self.runs(setting, stage) if run not in done]

    def choices(self, arms: Collection[str]) -> dict[str, str]:
        """Arm -> chosen candidate, of at least these arms."""
        choices = {arm: next(iter(ARMS[arm])) for arm in arms if len(ARMS[arm]) == 1}
        choices |= {row["arm"]: row["candidate"] for row in read_rows(self.choices_path)}
        if missing := [arm for arm in arms if arm not in choices]:
            raise SystemExit(
                f"{self.choices_path} has no choice for {', '.join(missing)}, and blind runs come after the choices. "
                f"Run --stage choose --setting {HOME}, then --stage decide."
            )
        return choices

    def decide(self) -> None:
        """Write down the choices, once all runs for them are made; after the first blind run they stand."""
        if blind := [name for name in self.settings if self.rows(name, "blind")]:
            print(f"the choices stand: there are blind rows of {', '.join(blind)}")
            return
        if missing := self.missing(HOME, "choose"):
            raise SystemExit(f"{len(missing)} runs to choose from are missing. Run --stage choose --setting {HOME}.")
        rows = choose([row for row in self.rows(HOME, "choose") if row["arm"] in self.arms])
        save_rows(self.choices_path, rows)
        for row in rows:
            ours = ", the one called ours" if row[OURS] else ""
            print(f"chosen for {row['arm']}: {row['candidate'] or 'nothing to choose'}{ours}")

    def durations(self, setting: str) -> dict[str, list[float]]:
        """Arm -> seconds of its runs in a setting, of both stages."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for row in self.rows(setting):
            seconds[row["arm"]].append(row["seconds"])
        return seconds


def run_of(row: Row) -> Run:
    """The run that a row tells of."""
    return Run(*(row[name] for name in Run._fields))


def seconds_of(runs: Sequence[Run], durations: Mapping[str, Sequence[float]]) -> float | None:
    """Seconds that runs take, by the median of an arm's other runs, or else of all; None if there are none."""
    if not durations:
        return None
    overall = median(itertools.chain.from_iterable(durations.values()))
    medians = {arm: median(seconds) for arm, seconds in durations.items()}
    return sum(medians.get(run.arm, overall) for run in runs)
