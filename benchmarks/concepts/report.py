"""Tables and plot of the concept study's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.intervals import cell_of, difference, estimate
from benchmarks.common.plots import save_plot
from benchmarks.common.rows import Row, write_rows
from benchmarks.concepts.evaluation import NEW_WORDING, SHUFFLED_ADAPTER, TRAINED, TRUE
from benchmarks.concepts.plan import ALL, CHOOSING_SEED, COSINE, GATED, OURS, POLY, SEPARATE, WHITENED, Study, area
from benchmarks.concepts.tasks import FAMILIES

ACCURACY, AREA = 0, 1
BI_ENCODER, INSIDE, CROSS = "bi-encoder", "hyperadapter in bi-encoder", "cross-encoder"
BILINEAR_INSIDE = "bilinear in bi-encoder"
CONTROLS = ("shuffled", "across corpora", "blank", "unrelated", "nearest trained")

# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {OURS: "#0072B2", "lora": "#E69F00", COSINE: "#000000", CROSS: "#CC79A7", BI_ENCODER: "#D55E00"}
COLORS |= {INSIDE: "#009E73", WHITENED: "#56B4E9", GATED: "#56B4E9", BILINEAR_INSIDE: "#009E73"}


def report(study: Study, folder: Path) -> None:
    """Print the tables, write the rows and draw; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = study.rows()
    if not rows:
        raise SystemExit(f"{study.path} has no rows yet. Run the other stages first.")
    _print_choices(rows)
    arms = {arm: members for arm in study.settings.arms if (members := _of(study, rows, "test", arm))}
    if arms:
        _print_arms(arms)
        _print_differences(arms)
        _print_corpora(arms)
    points = _of(study, rows, "curve", OURS)
    counts = sorted({row["concepts"] for row in points})
    curve = {count: [row for row in points if row["concepts"] == count] for count in counts}
    _print_curve(curve, arms)
    if OURS in arms:
        _plot(arms, curve, folder)
    write_rows(folder / "concepts.jsonl", rows)
    print(f"\nrows: {folder / 'concepts.jsonl'}")


def _of(study: Study, rows: Sequence[Row], stage: str, arm: str) -> list[Row]:
    """An arm's rows of a stage; if they have several learning rates, those of the one that was chosen."""
    members = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
    if len({row["rate"] for row in members}) > 1:
        members = [row for row in members if row["rate"] == study.rate(arm)]
    return members


def _print_choices(rows: Sequence[Row]) -> None:
    for stage, title in (("tune", "learning rates"), ("ablate", "changes of the hyperadapter")):
        members = [row for row in rows if row["stage"] == stage]
        if members:
            measures = "parameters, accuracy, area, all areas"
            print(f"\n{title}, seed {CHOOSING_SEED}, validation concepts by true description: {measures}")
        for row in members:
            families = row["scores"][TRUE]
            areas = [f"{name} {np.mean([s[AREA] for s in families[name].values()]):.3f}" for name in families]
            accuracy = np.mean([score[ACCURACY] for score in families["atomic"].values()])
            head = f"{row['arm']:<34}{row['rate']:>7g}{row['parameters']:>12,}"
            print(f"{head}{accuracy:>8.3f}{area(row):>8.3f}   {', '.join(areas)}")


def _print_arms(arms: dict[str, list[Row]]) -> None:
    print("\ntest concepts, each alone, and the areas of their compositions: mean [95% interval over tasks and seeds]")
    print(f"{'arm':<28}{'condition':<26}{'seeds':>5}  {'accuracy':<22}" + "".join(f"{f:<22}" for f in FAMILIES))
    for arm, rows in arms.items():
        for condition in dict.fromkeys(name for row in rows for name in row["scores"]):
            cells = [cell_of(rows, condition, family, AREA) for family in FAMILIES]
            accuracy = cell_of(rows, condition, "atomic", ACCURACY)
            shown = ["" if cell is None else str(estimate(cell.values)) for cell in (accuracy, *cells)]
            print(f"{arm:<28}{condition:<26}{len(rows):>5}  " + "".join(f"{text:<22}" for text in shown).rstrip())
    print(f"\n{'arm':<28}{'rate':>8}{'parameters':>12}{'loss':>8}{'CPU seconds of training':>26}")
    for arm, rows in arms.items():
        seconds = [row["train_cpu_seconds"] for row in rows if row["train_cpu_seconds"] is not None]
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        texts = (f"{np.mean(losses):.3f}" if losses else "-", f"{np.median(seconds):.0f}" if seconds else "-")
        print(f"{arm:<28}{rows[0]['rate']:>8g}{rows[0]['parameters']:>12,}{texts[0]:>8}{texts[1]:>26}")


def _print_differences(arms: dict[str, list[Row]]) -> None:
    pairs = [((arm, TRUE), (arm, condition)) for arm in (OURS, GATED) for condition in CONTROLS]
    others = (GATED, "lora", COSINE, BI_ENCODER, INSIDE, BILINEAR_INSIDE, CROSS)
    pairs += [((OURS, TRUE), (arm, TRUE)) for arm in others]
    pairs += [((GATED, TRUE), (arm, TRUE)) for arm in (WHITENED, "lora", COSINE, BI_ENCODER)]
    for inside in (INSIDE, BILINEAR_INSIDE):
        pairs += [((inside, TRUE), (inside, SHUFFLED_ADAPTER)), ((inside, TRUE), (BI_ENCODER, TRUE))]
        pairs += [((inside, TRUE), (COSINE, TRUE))]
    pairs += [((BI_ENCODER, TRUE), (COSINE, TRUE))]
    pairs += [((OURS, TRAINED), (arm, TRAINED)) for arm in (GATED, SEPARATE, POLY, "lora", BI_ENCODER, CROSS, COSINE)]
    pairs += [((GATED, TRAINED), (arm, TRAINED)) for arm in (WHITENED, SEPARATE, "lora")]
    pairs += [((OURS, TRAINED), (OURS, NEW_WORDING))]
    print("\ndifferences, paired by task and seed: accuracy of concepts alone, and areas by family")
    for (arm, condition), (other, wrong) in pairs:
        shown = []
        for family, measure in (("atomic", ACCURACY), *((family, AREA) for family in FAMILIES)):
            one = cell_of(arms.get(arm, []), condition, family, measure)
            two = cell_of(arms.get(other, []), wrong, family, measure)
            shown.append("" if one is None or two is None else str(difference(one, two)))
        if any(shown):
            name = f"{arm}, {condition} - {other}, {wrong}"
            print(f"{name:<72}" + "".join(f"{text:<24}" for text in shown).rstrip())


def _print_corpora(arms: dict[str, list[Row]]) -> None:
    cells = {arm: cell_of(rows, TRUE, "atomic", AREA) for arm, rows in arms.items()}
    names = sorted({task.partition("/")[0] for cell in cells.values() if cell for task in cell.tasks})
    print(f"\narea on test concepts alone, by corpus\n{'arm':<28}" + "".join(f"{name:>12}" for name in names))
    for arm, cell in cells.items():
        if cell:
            means = [cell.values[:, [task.startswith(f"{name}/") for task in cell.tasks]].mean() for name in names]
            print(f"{arm:<28}" + "".join(f"{mean:>12.3f}" for mean in means))


def _print_curve(curve: dict[int, list[Row]], arms: dict[str, list[Row]]) -> None:
    for count, rows in {**curve, ALL: arms.get(OURS, [])}.items():
        cells = [cell_of(rows, TRUE, "atomic", measure) for measure in (ACCURACY, AREA)]
        if rows and all(cells):
            texts = [str(estimate(cell.values)) for cell in cells if cell]
            print(f"{count or 'all':>4} trained concepts, {len(rows)} seeds: accuracy {texts[0]}, area {texts[1]}")


def _plot(arms: dict[str, list[Row]], curve: dict[int, list[Row]], folder: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_arms(left, arms)
    _plot_curve(right, curve, arms)
    save_plot(figure, folder / "concepts.svg")
    print(f"\nplot: {folder / 'concepts.svg'}")


def _plot_arms(axes: Axes, arms: dict[str, list[Row]]) -> None:
    shown = [(arm, TRUE) for arm in arms] + [(OURS, condition) for condition in CONTROLS]
    shown += [(inside, SHUFFLED_ADAPTER) for inside in (INSIDE, BILINEAR_INSIDE)]
    lines = [
        (arm, condition, estimate(cell.values))
        for arm, condition in shown
        if (cell := cell_of(arms.get(arm, []), condition, "atomic", AREA))
    ]
    for place, (arm, condition, (mean, low, high)) in enumerate(reversed(lines)):
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        fill = COLORS[arm] if condition == TRUE else "white"
        axes.errorbar(mean, place, xerr=error, fmt="o", capsize=3, color=COLORS[arm], markerfacecolor=fill)
    names = [arm if condition == TRUE else f"{arm}: {condition}" for arm, condition, _ in reversed(lines)]
    axes.set_yticks(range(len(lines)), names)
    axes.axvline(0.5, color="#999999", linestyle=":")
    axes.set_xlabel("area under the curve")
    axes.set_title("Concepts that were never trained")
    axes.grid(axis="x", alpha=0.3)


def _plot_curve(axes: Axes, curve: dict[int, list[Row]], arms: dict[str, list[Row]]) -> None:
    cells = {count: cell_of(rows, TRUE, "atomic", AREA) for count, rows in curve.items()}
    cells[arms[OURS][0]["trained_concepts"]] = cell_of(arms[OURS], TRUE, "atomic", AREA)
    points = {count: estimate(cell.values) for count, cell in cells.items() if cell}
    means, lows, highs = (np.array(column) for column in zip(*points.values(), strict=True))
    axes.plot(list(points), means, marker="o", color=COLORS[OURS], label=OURS)
    axes.fill_between(list(points), lows, highs, color=COLORS[OURS], alpha=0.12, linewidth=0)
    if cosine := cell_of(arms.get(COSINE, []), TRUE, "atomic", AREA):
        axes.axhline(cosine.values.mean(), color=COLORS[COSINE], linestyle="--", label=COSINE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [str(count) for count in points])
    axes.set_xlabel("trained concepts")
    axes.set_ylabel("area under the curve, unseen concepts")
    axes.set_title("By the number of trained concepts")
    axes.grid(alpha=0.3)
    axes.legend()
