"""Tables of the embedding study's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.common.rows import Row
from benchmarks.common.seeds import interval
from examples.support.embedding_texts import DATA

OURS = "hyperadapter"


def report(rows: Sequence[Row]) -> None:
    """Print what each rate had on validation rows, and what the chosen ones have on test rows."""
    print("\n| arm | rate | mean on validation rows |\n|---|---|---|")
    for row in rows:
        if row["split"] == "validation":
            print(f"| {row['arm']} | {row['rate']:g} | {_mean(row):.3f} |")
    arms: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["split"] == "test":
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    seeds = max((len(found) for found in arms.values()), default=0)
    print(f"\nOn test rows: nDCG@10, or accuracy; mean and 95% interval over {seeds} seeds\n")
    print(f"| arm | {' | '.join(DATA)} | mean | training loss | parameters | CPU seconds of training |")
    print("|---" * (len(DATA) + 5) + "|")
    for arm, found in arms.items():
        members = list(found.values())
        cells = [_cell([row["scores"][name] for row in members]) for name in DATA]
        cells.append(_cell([_mean(row) for row in members]))
        loss = "" if members[0]["loss"] is None else _cell([row["loss"] for row in members], digits=2)
        seconds = sum(row["train_cpu_seconds"] for row in members) / len(members)
        print(f"| {arm} | {' | '.join(cells)} | {loss} | {members[0]['parameters']:,} | {seconds:.0f} |")
    _print_differences(arms)


def _print_differences(arms: dict[str, dict[int, Row]]) -> None:
    print(f"\n| {OURS} minus | {' | '.join(DATA)} | mean |\n" + "|---" * (len(DATA) + 2) + "|")
    ours = arms.get(OURS, {})
    for arm, found in arms.items():
        # The frozen model is the same for all seeds.
        others = found if len(found) > 1 else dict.fromkeys(ours, next(iter(found.values())))
        pairs = [(row, others[seed]) for seed, row in ours.items() if seed in others]
        if arm == OURS or not pairs:
            continue
        cells = [_cell([one["scores"][name] - other["scores"][name] for one, other in pairs], "+") for name in DATA]
        cells.append(_cell([_mean(one) - _mean(other) for one, other in pairs], "+"))
        print(f"| {arm} | {' | '.join(cells)} |")


def _mean(row: Row) -> float:
    return sum(row["scores"].values()) / len(row["scores"])


def _cell(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:{sign}z.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
