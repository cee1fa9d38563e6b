"""Tables of the rows of the study of few texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.intervals import Cell, cell_of, difference, estimate
from benchmarks.common.rows import Row, write_rows
from benchmarks.concepts.report import ACCURACY, AREA
from benchmarks.concepts_shots.arms import ARMS, EXAMPLES, FROM_ANOTHER, FROM_ITS, LOGISTIC, NEW
from benchmarks.concepts_shots.plan import Study

PAIRS = (
    (FROM_ITS, NEW),
    (FROM_ITS, LOGISTIC),
    (FROM_ITS, FROM_ANOTHER),
    (EXAMPLES, NEW),
    (EXAMPLES, LOGISTIC),
    (NEW, LOGISTIC),
)
# Those where sentence vectors do not tell the classes apart by their topic.
NO_TOPICS = ("questions", "predicates")


def report(study: Study, folder: Path) -> None:
    """Print the tables and write the rows; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = study.rows()
    if not rows:
        raise SystemExit(f"{study.path} has no rows yet. Run the other stages first.")
    _print_choices(rows)
    rates = {arm: study.rate(arm) for arm in {row["arm"] for row in rows}}
    tested = [row for row in rows if row["stage"] == "test" and row["rate"] == rates[row["arm"]]]
    for corpora in ((), NO_TOPICS):
        _print_arms(study.settings.measured_after, tested, corpora)
        _print_differences(study.settings.measured_after, tested, corpora)
    write_rows(folder / "concepts_shots.jsonl", rows)
    print(f"\nrows: {folder / 'concepts_shots.jsonl'}")


def _print_choices(rows: Sequence[Row]) -> None:
    print("validation concepts: accuracy by steps")
    for row in rows:
        if row["stage"] == "tune":
            means = [
                f"{steps}: {np.mean([score[ACCURACY] for score in found['atomic'].values()]):.3f}"
                for steps, found in row["scores"].items()
            ]
            print(f"{row['arm']:<32}n = {row['n']:<4}rate {row['rate']:<8g}" + ", ".join(means))


def _print_arms(steps_of_lora: Sequence[int], rows: Sequence[Row], corpora: Sequence[str]) -> None:
    print(f"\n{_title(corpora)}: mean [95% interval over concepts and seeds]")
    print(f"{'arm':<32}{'rate':>7}{'steps':>6}{'n':>4}{'seeds':>6}{'concepts':>9}  {'accuracy':<22}area")
    for arm in ARMS:
        for n in sorted({row["n"] for row in rows if row["arm"] == arm}):
            for steps in steps_of_lora if ARMS[arm].is_lora else (0,):
                members = _of(rows, arm, n)
                cells = [_cell(members, steps, measure, corpora) for measure in (ACCURACY, AREA)]
                if cells[0] and cells[1]:
                    head = f"{arm:<32}{members[0]['rate']:>7g}{steps:>6}{n:>4}{len(members):>6}{len(cells[0].tasks):>9}"
                    print(f"{head}  {estimate(cells[0].values)!s:<22}{estimate(cells[1].values)}")


def _print_differences(steps_of_lora: Sequence[int], rows: Sequence[Row], corpora: Sequence[str]) -> None:
    print(f"\n{_title(corpora)}: one arm minus another, paired by concept and seed")
    for arm, other in PAIRS:
        for n in sorted({row["n"] for row in rows if row["arm"] == arm}):
            for steps in steps_of_lora if ARMS[arm].is_lora or ARMS[other].is_lora else (0,):
                shown = []
                for measure in (ACCURACY, AREA):
                    one, two = (
                        _cell(_of(rows, name, n), steps if ARMS[name].is_lora else 0, measure, corpora)
                        for name in (arm, other)
                    )
                    if one and two and set(one.seeds) & set(two.seeds):
                        shown.append(str(difference(one, two)))
                if shown:
                    print(
                        f"{f'{arm} - {other}':<60}{steps:>4} steps  n = {n:<4}" + "  ".join(f"{s:<24}" for s in shown)
                    )


def _of(rows: Sequence[Row], arm: str, n: int) -> list[Row]:
    return [row for row in rows if (row["arm"], row["n"]) == (arm, n)]


def _cell(rows: Sequence[Row], steps: int, measure: int, corpora: Sequence[str]) -> Cell | None:
    """As ``cell_of``, of the concepts of some corpora; of all, if none are named."""
    cell = cell_of(rows, str(steps), "atomic", measure)
    if cell is None or not corpora:
        return cell
    places = [index for index, task in enumerate(cell.tasks) if task.partition("/")[0] in corpora]
    return Cell([cell.tasks[index] for index in places], cell.seeds, cell.values[:, places]) if places else None


def _title(corpora: Sequence[str]) -> str:
    return f"test concepts of {' and '.join(corpora)}" if corpora else "all test concepts"
