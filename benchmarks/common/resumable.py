"""Studies of many runs: each is a row that is appended when it is done, so that a study goes on where it was."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.common.rows import Row, append_row, environment, read_rows

# A NamedTuple, of which a row has all fields; with the fields ``stage`` and ``arm``.
Run = TypeVar("Run", bound=Any)


class Runs(Generic[Run]):
    """A file of rows, one for each run.

    Args:
        path: The file; its folder is made.
        definition: Short name of what all rows must have in common.
        kind: Type of the runs.
    """

    def __init__(self, path: Path, definition: str, kind: type[Run]) -> None:
        self.path, self.definition, self._kind = path, definition, kind
        path.parent.mkdir(parents=True, exist_ok=True)

    def run_of(self, row: Row) -> Run:
        """The run that a row tells of."""
        return self._kind(*(row[name] for name in self._kind._fields))

    def rows(self) -> list[Row]:
        """The rows, each run once."""
        rows: dict[Run, Row] = {}
        for row in read_rows(self.path):
            if row["definition"] != self.definition:
                raise SystemExit(
                    f"{self.path} has rows of another definition of the study, {row['definition']}, which is "
                    f"{self.definition} now. Choose another --output."
                )
            rows.setdefault(self.run_of(row), row)
        return list(rows.values())

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those without a row."""
        done = {self.run_of(row) for row in self.rows()}
        return [run for run in runs if run not in done]

    def go_on(self, runs: Iterable[Run], measure: Callable[[Run], Row], deadline: float) -> bool:
        """Run what has no row yet; False if the time was up before, as the last run of the arm and stage tells."""
        shared = environment() | {"definition": self.definition}
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        seconds |= {(row["stage"], row["arm"]): row["seconds"] for row in self.rows()}
        for run in self.missing(runs):
            if time.monotonic() + seconds[run.stage, run.arm] > deadline:
                print("stopped: the time is up")
                return False
            started = time.monotonic()
            row = run._asdict() | measure(run)
            row["seconds"] = seconds[run.stage, run.arm] = round(time.monotonic() - started, 1)
            append_row(self.path, row | shared)
            print(*run, f"loss {row['loss']}, {row['cpu_seconds']} CPU seconds, {row['seconds']} in all", flush=True)
        return True
