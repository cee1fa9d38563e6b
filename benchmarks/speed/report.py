"""Rows, table, targets and plot of the speed benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common.plots import save_plot
from benchmarks.speed.arms import LORA, LORA_NAMES, MERGED, MIXED, NORMALIZED, PINNED, Scenario

Row = dict[str, Any]
SETTING = ("base", "batch", "length", "tasks", "measure", "mode")
LEVELS = (0.2, 0.5, 0.8)
COLORS = {
    "base": "#999999",
    LORA: "#000000",
    LORA_NAMES: "#E69F00",
    "poly": "#CC79A7",
    MIXED: "#0072B2",
    PINNED: "#009E73",
    MERGED: "#56B4E9",
}


@dataclass(frozen=True)
class Target:
    """What the package wants to reach.

    Attributes:
        text: What it says.
        setting: Fields that its rows have.
        arm: The arm.
        reference: The arm that it is divided by; None for the value itself.
        limit: The largest value that is good enough, after rounding to two decimals.
    """

    text: str
    setting: Row
    arm: str
    reference: str | None
    limit: float


def _target(text: str, measure: str, arm: str, reference: str | None, limit: float, **setting: Any) -> Target:
    return Target(text, {"measure": measure, "mode": "eager", **setting}, arm, reference, limit)


MIDDLE = {name: getattr(Scenario(), name) for name in ("base", "batch", "length", "tasks")}
WIDE = MIDDLE | {"batch": 64, "tasks": 64}
LARGE = {"base": "Llama-3-8B"}
TARGETS = (
    _target("training step, 16 tasks in a batch, over one LoRA", "training", MIXED, LORA, 1.05, **MIDDLE),
    _target("training step, soft_polar over soft_frobenius", "normalization", *reversed(NORMALIZED), 1.03, **MIDDLE),
    _target("its memory, over one LoRA", "memory", MIXED, LORA, 1.15, **MIDDLE),
    _target("forward, pinned task, over one LoRA", "forward", PINNED, LORA, 1.01, **MIDDLE),
    _target("forward, merged, over the base model", "forward", MERGED, "base", 1.00, **MIDDLE),
    _target("forward, 64 tasks in 64 rows, over adapter_names", "forward", MIXED, LORA_NAMES, 1 / 1.1, **WIDE),
    _target("seconds for a task's adapters of Llama-3-8B, r=16", "adapters", "hyperadapt", None, 1.0, **LARGE),
    _target("seconds that import hyperadapt adds to peft", "import", "hyperadapt", None, 0.3),
    *(
        _target(f"{measure} with 10,000 tasks, over 1,000", measure, "10000 tasks", "1000 tasks", 10.0)
        for measure in ("build", "save", "load")
    ),
)


def make_rows(setting: Row, unit: str, values: dict[str, list[float]], reference: str | None) -> list[Row]:
    """A row for each arm.

    Args:
        setting: The fields of ``SETTING`` that apply.
        unit: Of the values.
        values: The value of each turn, by arm.
        reference: The arm that ratios refer to, turn by turn; None for no ratios.

    Returns:
        The rows.
    """
    rows = []
    for arm, turns in values.items():
        row = {**dict.fromkeys(SETTING), **setting, "arm": arm, "unit": unit, "reference": reference}
        row |= dict(zip(("p20", "p50", "p80"), _quantiles(turns), strict=True))
        if reference is not None:
            ratios = ratio_quantiles(turns, values[reference])
            row |= dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), ratios, strict=True))
        rows.append({**row, "turns": [float(f"{value:.5g}") for value in turns]})
    return rows


def _quantiles(values: Sequence[float]) -> list[float]:
    quantiles: list[float] = np.quantile(values, LEVELS).tolist()
    return quantiles


def ratio_quantiles(turns: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Quantiles of the ratio within a turn: what slows a whole turn down cancels.

    Args:
        turns: An arm's value in each turn.
        reference: The other arm's, in the same turns.

    Returns:
        20th, 50th and 80th percentile.
    """
    return _quantiles([value / other for value, other in zip(turns, reference, strict=True)])


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the targets and write ``speed.svg``, if anything was compared with LoRA.

    Args:
        rows: The rows.
        folder: Where the rows are.
    """
    _print_targets(rows)
    print(f"\nrows: {folder / 'speed.jsonl'}")
    compared = [row for row in rows if row["reference"] == LORA and row["arm"] != LORA]
    if compared:
        _plot(compared, folder / "speed.svg")


def print_header() -> None:
    """Print the table's first line."""
    print(f"\n{'base':<14}{'batch':>5}{'length':>7}{'K':>6}  {'measure':<11}{'mode':<9}{'arm':<19}", end="")
    print(f"{'p20':>10}{'p50':>10}{'p80':>10}     {'ratio p20':>10}{'p50':>7}{'p80':>7}  of")


def print_rows(rows: Sequence[Row]) -> None:
    """Print lines of the table.

    Args:
        rows: The rows.
    """
    for row in rows:
        cells = ["" if row[name] is None else str(row[name]) for name in SETTING]
        print("{:<14}{:>5}{:>7}{:>6}  {:<11}{:<9}".format(*cells) + f"{row['arm']:<19}", end="")
        print("".join(f"{row[name]:>10.4g}" for name in ("p20", "p50", "p80")) + f" {row['unit']:<4}", end="")
        if row["reference"] is not None:
            ratios = [row[name] for name in ("ratio_p20", "ratio_p50", "ratio_p80")]
            print("{:>10.3f}{:>7.3f}{:>7.3f}  ".format(*ratios) + row["reference"], end="")
        print(flush=True)


def target_values(target: Target, rows: Iterable[Row]) -> list[float] | None:
    """What was measured for a target.

    Args:
        target: The target.
        rows: The rows.

    Returns:
        20th, 50th and 80th percentile; None if it was not measured.
    """
    arms = {row["arm"]: row["turns"] for row in rows if target.setting.items() <= row.items()}
    if target.arm not in arms:
        return None
    turns: list[float] = arms[target.arm]
    return _quantiles(turns) if target.reference is None else ratio_quantiles(turns, arms[target.reference])


def _print_targets(rows: Sequence[Row]) -> None:
    measured = [(target, values) for target in TARGETS if (values := target_values(target, rows)) is not None]
    if not measured:
        return
    print(f"\n{'target':<52}{'at most':>8}{'p20':>8}{'p50':>8}{'p80':>8}")
    for target, values in measured:
        shown = "".join(f"{value:>8.3f}" for value in values)
        verdict = "reached" if round(values[1], 2) <= round(target.limit, 2) else "missed"
        print(f"{target.text:<52}{target.limit:>8.2f}{shown}  {verdict}")


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Ratios to LoRA, a panel for each measure; a bar goes from the 20th to the 80th percentile."""
    panels = list(dict.fromkeys((row["measure"], row["mode"]) for row in rows))
    # Two, so that names can be read where a page is as wide as its text.
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 4.2 * lines), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        _plot_panel(axes, [row for row in rows if (row["measure"], row["mode"]) == panel])
        axes.set_title(f"{panel[0]}, {panel[1]}: over one LoRA", fontsize="medium")
    handles = [Line2D([], [], color=color, marker="o", label=arm) for arm, color in COLORS.items() if arm != LORA]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save_plot(figure, path)
    print(f"plot: {path}")


def _plot_panel(axes: Axes, rows: Sequence[Row]) -> None:
    names = [f"{row['base']}\n{row['batch']}x{row['length']}, K={row['tasks']}" for row in rows]
    places = list(dict.fromkeys(names))
    arms = [arm for arm in COLORS if any(row["arm"] == arm for row in rows)]
    for row, name in zip(rows, names, strict=True):
        low, middle, high = (row[key] for key in ("ratio_p20", "ratio_p50", "ratio_p80"))
        y = places.index(name) + 0.8 * ((arms.index(row["arm"]) + 0.5) / len(arms) - 0.5)
        axes.errorbar([middle], [y], xerr=[[middle - low], [high - middle]], fmt="o", color=COLORS[row["arm"]])
    axes.set_yticks(range(len(places)), places, fontsize="x-small")
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.axvline(1, color=COLORS[LORA], linewidth=1)
    axes.grid(axis="x", alpha=0.3)
