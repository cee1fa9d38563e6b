"""Table of the continual study's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.common.rows import Row, write_rows
from benchmarks.common.seeds import interval, shown

COLUMNS: dict[str, Callable[[Row], float]] = {
    "known, before": lambda row: fmean(row["before"].values()),
    "known, after": lambda row: fmean(row["after"].values()),
    "change": lambda row: fmean(row["after"].values()) - fmean(row["before"].values()),
    "worst change": lambda row: min(row["after"][task] - row["before"][task] for task in row["before"]),
    "new": lambda row: row["new"],
}

PAIRS = (
    ("hyperadapter, replay", "hyperadapter, no replay"),
    ("LoRA, replay", "LoRA, no replay"),
    ("hyperadapter, no replay", "LoRA, no replay"),
    ("hyperadapter, replay", "LoRA, replay"),
    ("LoRA, and an own one", "hyperadapter, exact"),
    ("hyperadapter, exact", "hyperadapter, embedding alone"),
)


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the table and write ``continual.jsonl``.

    Args:
        rows: The rows.
        folder: Where the file goes; it is made.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows=[]: there is nothing to report yet. Run the benchmark without --report first.")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "continual.jsonl", rows)
    print("mean test accuracy with 95% interval over seeds; the worst change is that of the known task that lost most")
    heads = "".join(f"{name:>17}" for name in COLUMNS)
    print(f"{'arm':<31}{'rate':>7}{heads}{'exact':>7}{'seeds':>7}")
    for arm, rate in dict.fromkeys((row["arm"], row["rate"]) for row in rows):
        chosen = [row for row in rows if (row["arm"], row["rate"]) == (arm, rate)]
        cells = [
            shown(*interval([value(row) for row in chosen]), sign="+" if "change" in name else "")
            for name, value in COLUMNS.items()
        ]
        exact = "yes" if all(row["identical"] for row in chosen) else "no"
        print(f"{arm:<31}{rate:>7g}" + "".join(f"{cell:>17}" for cell in cells) + f"{exact:>7}{len(chosen):>7}")
    print("\none arm minus another, at the same rate where both have it, paired by seed")
    names = list(COLUMNS)[2:]
    for first, second in PAIRS:
        for rate in _rates(rows, first):
            other = rate if rate in _rates(rows, second) else next(iter(_rates(rows, second)), rate)
            cells = [f"{name} {_difference(rows, name, (first, rate), (second, other))}" for name in names]
            print(f"{first} minus {second}, {rate:g}: {', '.join(cells)}")


def _rates(rows: Sequence[Row], arm: str) -> dict[float, None]:
    return dict.fromkeys(row["rate"] for row in rows if row["arm"] == arm)


def _difference(rows: Sequence[Row], name: str, first: tuple[str, float], second: tuple[str, float]) -> str:
    """Mean difference of a column with its interval, over the seeds that both arms have."""
    one, other = (
        {row["seed"]: COLUMNS[name](row) for row in rows if (row["arm"], row["rate"]) == key} for key in (first, second)
    )
    return shown(*interval([one[seed] - other[seed] for seed in one.keys() & other]), sign="+")
