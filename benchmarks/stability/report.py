"""Tables and plot of the stability study's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.plots import save_plot
from benchmarks.common.rows import read_rows, write_rows
from benchmarks.common.seeds import interval, shown
from benchmarks.stability.arms import is_hyperadapter
from benchmarks.stability.plan import Study
from benchmarks.stability.settings import HOME, STAGES, Setting
from benchmarks.stability.summary import OURS, Cells, by_arm, label, summarize_arms

Row = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers.
LINES = {
    "lora": ("LoRA", "#E69F00"),
    "lora + clipping": ("LoRA, gradients clipped", "#999999"),
    "none": ("hypernetwork, not normalised", "#000000"),
}
COLOR_OF_OURS = "#0072B2"
# Heading and width of each column but the arm's.
COLUMNS = (
    ("best rate", 11),
    ("accuracy", 10),
    ("minus lora", 17),
    ("at lora's rate", 17),
    ("least, same rate", 28),
    ("decades", 9),
    ("diverged", 10),
    ("CPU seconds", 13),
)


def report(study: Study, folder: Path) -> None:
    """Print the tables of both stages, and write the rows and the plot of the blind ones; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {(stage, name): complete_rows(study, name, stage) for stage in STAGES for name in study.settings}
    if not any(rows.values()):
        raise SystemExit(f"{study.folder} has no arm with all of its runs. Run the stages before the report.")
    for (stage, name), members in rows.items():
        if members:
            _print_tables(name, study.settings[name], stage, by_arm(members))
            own = [row for row in members if row["setting"] == name]
            write_rows(folder / f"stability_{name}{'' if stage == 'blind' else '_choose'}.jsonl", own)
    if blind := rows["blind", HOME]:
        choices = read_rows(study.choices_path)
        write_rows(folder / "stability_choices.jsonl", choices)
        _plot(by_arm(blind), [label(row["arm"], row["candidate"]) for row in choices if row[OURS]], folder)


def complete_rows(study: Study, name: str, stage: str) -> list[Row]:
    """The rows of the arms of a setting that have all their runs; the others are named.

    Where only hypernetworks differ from the setting of today, its rows are those of the other methods.
    """
    setting = study.settings[name]
    rows = study.rows(name, stage)
    if rows and setting.hypernetwork:
        rows += [row for row in study.rows(HOME, stage) if not is_hyperadapter(row["arm"])]
    if stage == "blind" and rows:
        choices = study.choices({row["arm"] for row in rows})
        if other := [row for row in rows if choices[row["arm"]] != row["candidate"]]:
            row = other[0]
            raise SystemExit(
                f"{study.path(name)} has blind rows of {label(row['arm'], row['candidate'])}, but "
                f"{choices[row['arm']]!r} was chosen in {study.choices_path}. The choices stand, or another --output."
            )
    whole = {(seed, rate) for seed in STAGES[stage].seeds(setting) for rate in setting.rates}
    made: dict[tuple[str, str], set[tuple[int, float]]] = {}
    for row in rows:
        made.setdefault((row["arm"], row["candidate"]), set()).add((row["seed"], row["rate"]))
    if unfinished := [label(*key) for key, runs in made.items() if runs != whole]:
        print(f"\n{name}, {stage}: left out until all of their runs are made: {', '.join(unfinished)}")
    return [row for row in rows if made[row["arm"], row["candidate"]] == whole]


def _print_tables(name: str, setting: Setting, stage: str, arms: Mapping[str, Cells]) -> None:
    seeds = ", ".join(map(str, STAGES[stage].seeds(setting)))
    rows = f"{STAGES[stage].split} rows"
    print(f"\n{name}, stage {stage} (seeds {seeds}; {rows}): mean accuracy in percent by rate; each ! a diverged seed")
    print(f"{'arm':<46}" + "".join(f"{rate:>10g}" for rate in setting.rates).rstrip())
    for arm, cells in arms.items():
        print(f"{arm:<46}" + " ".join(f"{_accuracy(cells, rate):>9}" for rate in setting.rates).rstrip())
    print(f"\n{name}, stage {stage}: decades within one point of the best of all arms, without a diverged seed")
    print(f"{'arm':<46}" + "".join(f"{heading:>{width}}" for heading, width in COLUMNS))
    for summary in summarize_arms(arms):
        cells = zip(_summary(summary), COLUMNS, strict=True)
        print(f"{summary['arm']:<46}" + "".join(f"{cell:>{width}}" for cell, (_, width) in cells))


def _accuracy(cells: Cells, rate: float) -> str:
    return f"{100 * cells[rate].accuracy:.1f}" + "!" * cells[rate].diverged


def _summary(row: Row) -> tuple[str, ...]:
    return (
        "-" if row["best_rate"] is None else f"{row['best_rate']:g}",
        f"{row['accuracy']:.3f}",
        shown(*row["minus_lora"], sign="+"),
        shown(*row["at_loras_rate"], sign="+"),
        f"{shown(*row['least'], sign='+')} at {row['least_rate']:g}",
        "-" if math.isnan(row["decades"]) else f"{row['decades']:g}",
        f"{row['diverged']}/{row['runs']}",
        f"{row['cpu_seconds']:.1f}",
    )


def _plot(arms: Mapping[str, Cells], ours: Sequence[str], folder: Path) -> None:
    """LoRA's cliff beside ours: mean accuracy over the rate with its 95% interval, a cross where a seed diverged."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = LINES | {name: (f"hyperadapt: {name}", COLOR_OF_OURS) for name in ours}
    for name, (title, color) in lines.items():
        if name not in arms:
            continue
        cells = arms[name]
        means, halves = zip(*(interval(cell.accuracies) for cell in cells.values()), strict=True)
        axes.plot(list(cells), means, marker="o", color=color, label=title)
        lows, highs = zip(*((m - h, m + h) for m, h in zip(means, halves, strict=True)), strict=True)
        axes.fill_between(list(cells), lows, highs, color=color, alpha=0.12, linewidth=0)
        diverged = {rate: cell.accuracy for rate, cell in cells.items() if cell.diverged}
        axes.plot(list(diverged), list(diverged.values()), "x", markersize=12, markeredgewidth=2, color=color)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test accuracy")
    axes.set_title("Five tasks, five new seeds: mean and its 95% interval; × a seed diverged")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_plot(figure, folder / "stability.svg")
    print(f"\nblind rows and plot: {folder / 'stability_*.jsonl'}, {folder / 'stability.svg'}")
