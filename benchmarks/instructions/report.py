"""Tables and plot of the instruction study's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.intervals import Cell, cell_of, difference, estimate
from benchmarks.common.plots import save_plot
from benchmarks.common.rows import Row, write_rows
from benchmarks.instructions.evaluation import NEW_WORDING, TRAINED, TRUE, WRONG
from benchmarks.instructions.plan import ALL, BASE, CHOOSING_SEED, LONGER, LORA, OURS, TOLD, WHITENED, Study, measured
from benchmarks.instructions.shots import BY_EXAMPLES, FRESH, PROMPT, WARM, condition_of
from benchmarks.instructions.tasks import KINDS

EXACT, LOSS = 0, 1
EVERY = "all"
SHOWN = (EVERY, *KINDS)

# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = {OURS: "#0072B2", WHITENED: "#56B4E9", LONGER: "#009E73", LORA: "#E69F00", TOLD: "#D55E00", BASE: "#000000"}


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
        _print_trained(arms)
        _print_differences(arms)
    _print_shots(study, rows)
    points = _of(study, rows, "curve", OURS)
    curve = {
        count: [row for row in points if row["tasks"] == count] for count in sorted({row["tasks"] for row in points})
    }
    _print_curve(curve, arms)
    if OURS in arms:
        _plot(arms, curve, folder)
    write_rows(folder / "instructions.jsonl", rows)
    print(f"\nrows: {folder / 'instructions.jsonl'}")


def held_out(rows: Sequence[Row], condition: str, kind: str, measure: int) -> Cell | None:
    """Values of the tasks of a kind, or of every one that is held out."""
    if kind != EVERY:
        return cell_of(rows, condition, kind, measure)
    merged = [
        {"seed": row["seed"], "scores": {condition: {EVERY: _merged(row["scores"].get(condition, {}))}}} for row in rows
    ]
    return cell_of(merged, condition, EVERY, measure)


def _merged(kinds: dict[str, dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return {task: score for kind, tasks in kinds.items() if kind in KINDS for task, score in tasks.items()}


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
            print(f"\n{title}, seed {CHOOSING_SEED}, validation tasks: exact answers, loss, by kind")
        for row in members:
            [(condition, kinds)] = row["scores"].items()
            told = "true description" if condition == TRUE else condition
            texts = [f"{kind} {np.mean([score[EXACT] for score in kinds[kind].values()]):.3f}" for kind in kinds]
            exact, loss = measured(row)
            print(f"{row['arm']:<26}{row['rate']:>8g}{exact:>8.3f}{loss:>8.3f}   by {told}: {', '.join(texts)}")


def _print_arms(arms: dict[str, list[Row]]) -> None:
    print("\ntest tasks: exact answers, and loss of a token: mean [95% interval over tasks and seeds]")
    print(f"{'arm':<30}{'condition':<17}{'seeds':>5}  " + "".join(f"{kind:<22}" for kind in SHOWN) + "loss")
    for arm, rows in arms.items():
        for condition in (TRUE, *WRONG):
            cells = [held_out(rows, condition, kind, EXACT) for kind in SHOWN]
            if any(cells):
                loss = held_out(rows, condition, EVERY, LOSS)
                shown = ["" if cell is None else str(estimate(cell.values)) for cell in (*cells, loss)]
                print(f"{arm:<30}{condition:<17}{len(rows):>5}  " + "".join(f"{text:<22}" for text in shown).rstrip())
    title = f"{'parameters':>12}{'tokens of a prompt':>20}{'loss':>8}{'CPU seconds of training':>26}"
    print(f"\n{'arm':<30}{'rate':>8}{title}")
    for arm, rows in arms.items():
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        means = [np.mean([row[name] for row in rows]) for name in ("prompt_tokens", "train_cpu_seconds")]
        texts = (f"{means[0]:.1f}", f"{np.mean(losses):.3f}" if losses else "-", f"{means[1]:.0f}")
        print(f"{arm:<30}{rows[0]['rate']:>8g}{rows[0]['parameters']:>12,}{texts[0]:>20}{texts[1]:>8}{texts[2]:>26}")


def _print_trained(arms: dict[str, list[Row]]) -> None:
    print("\ntrained tasks, new texts: exact answers, by a wording that was trained and by one that was not")
    for arm, rows in arms.items():
        cells = [cell_of(rows, condition, TRAINED, EXACT) for condition in (TRAINED, NEW_WORDING)]
        print(f"{arm:<30}" + "".join(f"{estimate(cell.values)!s:<22}" for cell in cells if cell).rstrip())


def _print_differences(arms: dict[str, list[Row]]) -> None:
    pairs = [((OURS, TRUE), (OURS, condition)) for condition in WRONG]
    pairs += [((OURS, TRUE), (arm, TRUE)) for arm in (LORA, TOLD, BASE)]
    pairs += [((arm, TRUE), (other, TRUE)) for arm, other in ((WHITENED, OURS), (WHITENED, TOLD), (LONGER, TOLD))]
    pairs += [((arm, TRUE), (arm, "nearest trained")) for arm in (WHITENED, LONGER)]
    print("\ndifferences of exact answers, paired by task and seed")
    for (arm, condition), (other, wrong) in pairs:
        shown = []
        for kind in SHOWN:
            one = held_out(arms.get(arm, []), condition, kind, EXACT)
            two = held_out(arms.get(other, []), wrong, kind, EXACT)
            shown.append("" if one is None or two is None else str(difference(one, two)))
        if any(shown):
            name = f"{arm}, {condition} - {other}, {wrong}"
            print(f"{name:<66}" + "".join(f"{text:<24}" for text in shown).rstrip())


def _print_shots(study: Study, rows: Sequence[Row]) -> None:
    arms = {arm: _of(study, rows, "shots", arm) for arm in study.settings.shot_arms}
    for count in study.settings.shots.counts if any(arms.values()) else ():
        print(f"\n{count} examples of test tasks: exact answers of {study.settings.shots.tasks} tasks")
        cells = {arm: held_out(members, condition_of(count), EVERY, EXACT) for arm, members in arms.items()}
        for arm, cell in cells.items():
            if cell is not None:
                print(f"{arm:<26}{len(cell.seeds):>3} seeds, rate {arms[arm][0]['rate']:g}: {estimate(cell.values)}")
        for arm in (WARM, BY_EXAMPLES, PROMPT):
            one, two = cells[arm], cells[FRESH]
            if one is not None and two is not None:
                print(f"{arm} - {FRESH}: {difference(one, two)}")


def _print_curve(curve: dict[int, list[Row]], arms: dict[str, list[Row]]) -> None:
    for count, rows in {**curve, ALL: arms.get(OURS, [])}.items():
        cells = [held_out(rows, TRUE, kind, EXACT) for kind in SHOWN]
        if any(cells):
            texts = [f"{kind} {estimate(cell.values)}" for kind, cell in zip(SHOWN, cells, strict=True) if cell]
            trained = cell_of(rows, TRAINED, TRAINED, EXACT)
            texts += [f"{TRAINED} {estimate(trained.values)}"] if trained else []
            loss = np.mean([row["loss"] for row in rows])
            print(f"{count or 'all':>4} trained tasks, {len(rows)} seeds: {', '.join(texts)}, loss {loss:.4f}")


def _plot(arms: dict[str, list[Row]], curve: dict[int, list[Row]], folder: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_arms(left, arms)
    _plot_curve(right, curve, arms)
    save_plot(figure, folder / "instructions.svg")
    print(f"\nplot: {folder / 'instructions.svg'}")


def _plot_arms(axes: Axes, arms: dict[str, list[Row]]) -> None:
    shown = [(arm, TRUE) for arm in arms] + [(OURS, condition) for condition in WRONG]
    lines = [
        (arm, condition, estimate(cell.values))
        for arm, condition in shown
        if (cell := held_out(arms[arm], condition, EVERY, EXACT))
    ]
    for place, (arm, condition, (mean, low, high)) in enumerate(reversed(lines)):
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        fill = COLORS[arm] if condition == TRUE else "white"
        axes.errorbar(mean, place, xerr=error, fmt="o", capsize=3, color=COLORS[arm], markerfacecolor=fill)
    names = [arm if condition == TRUE else f"{arm}: {condition}" for arm, condition, _ in reversed(lines)]
    axes.set_yticks(range(len(lines)), names)
    axes.set_xlim(-0.02, 1)
    axes.set_xlabel("exact answers")
    axes.set_title("Instructions that were never trained")
    axes.grid(axis="x", alpha=0.3)


def _plot_curve(axes: Axes, curve: dict[int, list[Row]], arms: dict[str, list[Row]]) -> None:
    members = curve | {arms[OURS][0]["trained_tasks"]: arms[OURS]}
    for kind, style in zip(SHOWN, ("-", "--", "-.", ":"), strict=True):
        cells = {count: held_out(rows, TRUE, kind, EXACT) for count, rows in members.items()}
        points = {count: cell.values.mean() for count, cell in cells.items() if cell}
        axes.plot(list(points), list(points.values()), style, marker="o", color=COLORS[OURS], label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(members), [str(count) for count in members])
    axes.set_xlabel("trained tasks")
    axes.set_ylabel("exact answers, unseen tasks")
    axes.set_title("By the number of trained tasks")
    axes.grid(alpha=0.3)
    axes.legend()
