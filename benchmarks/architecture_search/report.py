"""What the rows of the architecture search say: rank correlations, regrets, costs, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kendalltau, spearmanr

from benchmarks.common.plots import save_plot

Row = dict[str, Any]
Scores = dict[str, float]

COLORS = {2: "#56B4E9", 4: "#009E73", 8: "#D55E00"}
MARKERS = "osD^vP"


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Each candidate's mean.

    Args:
        scores: The scores of each seed.

    Returns:
        The means by candidate.
    """
    return {name: fmean(seed[name] for seed in scores) for name in scores[0]}


def judge(scores: Scores, truth: Scores) -> Row:
    """What a ranking is worth.

    Args:
        scores: What the ranking goes by; the candidate with the highest is picked, the first of equal ones.
        truth: Accuracies of the same candidates trained alone.

    Returns:
        Kendall's tau-b and Spearman's rho (0 where all scores are equal), the pick, its regret (true accuracy of the
        best minus that of the pick), and the mean regret of a random pick.
    """
    names, best = list(truth), max(truth.values())
    columns = [scores[name] for name in names], [truth[name] for name in names]
    is_defined = all(len(set(column)) > 1 for column in columns)
    pick = max(names, key=scores.__getitem__)
    return {
        "kendall": float(kendalltau(*columns).statistic) if is_defined else 0.0,
        "spearman": float(spearmanr(*columns).statistic) if is_defined else 0.0,
        "pick": pick,
        "regret": best - truth[pick],
        "random_regret": best - fmean(truth.values()),
    }


def judge_all(rows: Sequence[Row]) -> list[Row]:
    """Judge every ranking of the study.

    Args:
        rows: Runs of the searches, and of the candidates trained alone (``"alone"``) with at least two seeds.

    Returns:
        The runs, and a row of the arm ``"parameter count"``, which ranks without a run; each with what ``judge`` says.
    """
    alone = [row for row in rows if row["arm"] == "alone"]
    truth = mean_scores([row["test"] for row in alone])
    judged = [row | judge(row["validation"], truth) for row in rows if row["arm"] != "alone"]
    judged.append({"arm": "parameter count", **judge(alone[0]["parameters"], truth)})
    for row in alone:
        others = mean_scores([other["test"] for other in alone if other is not row])
        judged.append(row | judge(row["validation"], others))
    return judged


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the tables and write the plot.

    Args:
        rows: What ``judge_all`` returns.
        folder: Where ``architecture_search.svg`` goes.
    """
    arms = {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}
    alone = arms["alone"]
    truth = mean_scores([row["test"] for row in alone])
    searches = {arm: runs for arm, runs in arms.items() if arm not in ("alone", "parameter count")}
    _print_candidates(alone, truth, searches)
    _print_rankings(arms)
    _plot(searches, truth, folder)


def _print_candidates(alone: Sequence[Row], truth: Scores, searches: dict[str, list[Row]]) -> None:
    print("\nmean accuracy in percent: alone on test rows (the truth), the rest on validation rows")
    columns = {"alone, test": truth}
    for arm, runs in {"alone": alone, **searches}.items():
        columns[arm] = mean_scores([run["validation"] for run in runs])
    print(f"{'candidate':<30}{'parameters':>11}" + "".join(f"{name:>16}" for name in columns))
    for name, parameters in alone[0]["parameters"].items():
        cells = "".join(f"{100 * column[name]:>16.1f}" for column in columns.values())
        print(f"{name:<30}{parameters:>11,}{cells}")


def _print_rankings(arms: dict[str, list[Row]]) -> None:
    print(
        "\nmean (lowest to highest seed); regret in points of true accuracy; trained parameters, and CPU seconds to\n"
        "train and validate all candidates once"
    )
    print(
        f"{'ranking':<16}{'seeds':>6}{'Kendall':>22}{'Spearman':>22}{'regret':>19}{'random':>8}{'parameters':>12}"
        f"{'seconds':>9}  picks"
    )
    for arm, runs in arms.items():
        parameters = runs[0].get("parameters", 0)
        total = sum(parameters.values()) if isinstance(parameters, dict) else parameters
        print(
            f"{arm:<16}{len(runs):>6}{_spread(runs, 'kendall', 2):>22}{_spread(runs, 'spearman', 2):>22}"
            f"{_spread(runs, 'regret', 1, 100):>19}{100 * fmean(run['random_regret'] for run in runs):>8.1f}"
            f"{total:>12,}{fmean(run.get('seconds', 0) for run in runs):>9.0f}  "
            + " | ".join(dict.fromkeys(run["pick"] for run in runs))
        )


def _spread(runs: Sequence[Row], name: str, digits: int, unit: float = 1) -> str:
    values = [unit * run[name] for run in runs]
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _plot(searches: dict[str, list[Row]], truth: Scores, folder: Path) -> None:
    figure = Figure(figsize=(4.2 * len(searches) + 2.5, 4.4), layout="constrained")
    panels = figure.subplots(1, len(searches), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (arm, runs) in zip(panels, searches.items(), strict=True):
        _plot_arm(panel, mean_scores([run["validation"] for run in runs]), truth)
        panel.set_title(f"{arm}\nKendall's tau {_spread(runs, 'kendall', 2)}")
        panel.set_xlabel("accuracy with generated weights, validation rows")
    panels[0].set_ylabel("accuracy trained alone, test rows")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save_plot(figure, folder / "architecture_search.svg")
    print(f"\nrows and plot: {folder / 'architecture_search.jsonl'}, {folder / 'architecture_search.svg'}")


def _plot_arm(panel: Axes, found: Scores, truth: Scores) -> None:
    """A point for each candidate: the colour tells the rank, the marker the modules."""
    targets = list(dict.fromkeys(name.split("; r = ")[0] for name in truth))
    for name, accuracy in truth.items():
        modules, r = name.split("; r = ")
        marker = MARKERS[targets.index(modules)]
        panel.plot(found[name], accuracy, marker, color=COLORS[int(r)], label=name)
    panel.grid(alpha=0.3)
