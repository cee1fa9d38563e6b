"""Tables of the rows of the study of first steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.common.rows import Row, write_rows
from benchmarks.common.seeds import interval, shown
from benchmarks.first_steps.runs import ARMS, LORA

ALL_SETS = "mean"


def report(rows: Sequence[Row], default_rate: float, folder: Path) -> None:
    """Print the tables and write ``first_steps.jsonl``; the folder is made."""
    if not rows:
        raise SystemExit("There are no rows yet. Run the other stages first.")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "first_steps.jsonl", rows)
    steps, sets = list(rows[0]["accuracies"]), list(dict.fromkeys(row["set"] for row in rows))
    heads = "".join(f"{f'{step} steps':>17}" for step in steps)
    print(f"validation rows, one seed: mean accuracy over the sets\n{'arm':<20}{'rate':>8}{heads}")
    tuned = [row for row in rows if row["stage"] == "tune"]
    for arm, rate in dict.fromkeys((row["arm"], row["rate"]) for row in tuned):
        cells = [shown(*interval(list(_by_seed(tuned, arm, rate, sets, step).values()))) for step in steps]
        print(f"{arm:<20}{rate:>8g}" + "".join(f"{cell:>17}" for cell in cells))
    tested = [row for row in rows if row["stage"] == "test"]
    for name in (*sets, ALL_SETS):
        members = sets if name == ALL_SETS else [name]
        shares = {row["set"]: row["majority"] for row in tested if row["set"] in members}
        if shares:
            print(f"\n{name}: test accuracy, 95% interval over seeds; most frequent class {fmean(shares.values()):.3f}")
            print(f"{'arm':<20}{'rate':>8}{heads}{'seeds':>7}")
            _print_set(tested, members, steps, default_rate)


def _print_set(rows: Sequence[Row], sets: Sequence[str], steps: Sequence[str], default_rate: float) -> None:
    keys = list(dict.fromkeys((row["arm"], row["rate"]) for row in rows))
    keys.sort(key=lambda key: (ARMS.index(key[0]), key[1]))
    for arm, rate in keys:
        found = [_by_seed(rows, arm, rate, sets, step) for step in steps]
        cells = [shown(*interval(list(values.values()))) for values in found]
        print(f"{arm:<20}{rate:>8g}" + "".join(f"{cell:>17}" for cell in cells) + f"{len(found[0]):>7}")
    # Where the default is the best rate, an arm has one.
    rate_of: dict[str, Callable[[list[float]], float]] = {
        "at the default rate": lambda rates: default_rate,
        "each at its best rate": lambda rates: next((one for one in rates if one != default_rate), default_rate),
    }
    for title, chosen in rate_of.items():
        rates = {arm: chosen([rate for name, rate in keys if name == arm]) for arm in dict.fromkeys(a for a, _ in keys)}
        for arm in rates:
            if arm != LORA and LORA in rates:
                cells = []
                for step in steps:
                    one, other = (_by_seed(rows, name, rates[name], sets, step) for name in (arm, LORA))
                    differences = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
                    cells.append(shown(*interval(differences), sign="+"))
                print(f"{f'{arm} - {LORA}':<28}" + "".join(f"{cell:>17}" for cell in cells) + f"  {title}")


def _by_seed(rows: Sequence[Row], arm: str, rate: float, sets: Sequence[str], step: str) -> dict[int, float]:
    """Seed -> mean accuracy over the sets, of seeds that have them all."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["arm"], row["rate"]) == (arm, rate) and row["set"] in sets:
            found.setdefault(row["seed"], []).append(fmean(row["accuracies"][step]))
    return {seed: fmean(values) for seed, values in sorted(found.items()) if len(values) == len(sets)}
