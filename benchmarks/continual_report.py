"""Table of the continual study's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.rows import Row, write_rows
from benchmarks.transfer_report import interval, shown

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
    print(f"{'arm':<24}{'rate':>7}{heads}{'exact':>7}{'seeds':>7}")
    for arm, rate in dict.fromkeys((row["arm"], row["rate"]) for row in rows):
        chosen = [row for row in rows if (row["arm"], row["rate"]) == (arm, rate)]
        cells = [
            shown(*interval([value(row) for row in chosen]), sign="+" if "change" in name else "")
            for name, value in COLUMNS.items()
        ]
        exact = "yes" if all(row["identical"] for row in chosen) else "no"
        print(f"{arm:<24}{rate:>7g}" + "".join(f"{cell:>17}" for cell in cells) + f"{exact:>7}{len(chosen):>7}")
    print("\none arm minus another at the same rate, paired by seed")
    for first, second in PAIRS:
        for rate in dict.fromkeys(row["rate"] for row in rows if row["arm"] == first):
            cells = [
                f"{name} {_difference(rows, value, first, second, rate)}" for name, value in list(COLUMNS.items())[2:]
            ]
            print(f"{first} minus {second}, {rate:g}: {', '.join(cells)}")


def _difference(rows: Sequence[Row], value: Callable[[Row], float], first: str, second: str, rate: float) -> str:
    """Mean difference of a column with its interval, over the seeds that both arms have."""
    by_seed = [
        {row["seed"]: value(row) for row in rows if (row["arm"], row["rate"]) == (arm, rate)} for arm in (first, second)
    ]
    return shown(*interval([by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0].keys() & by_seed[1]]), sign="+")
