"""What the stability study's tables and choices say follows from the rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.rows import append_row, read_rows, write_rows
from benchmarks.stability.plan import Run, Study, seconds_of
from benchmarks.stability.report import report
from benchmarks.stability.settings import HOME, SETTINGS, STAGES, Setting
from benchmarks.stability.summary import OURS, best_rate, by_arm, choose, decades, good_range, summarize_arms

RATES = (0.001, 0.01, 0.1, 1.0)
SMALL, WIDE = Setting(rates=RATES, seeds=1), Setting(rates=RATES, seeds=1, hypernetwork={"hypernetwork_dim": 512})


CHOSEN = "bound 0.2, warm-up 1"


def rows_of(
    arm: str, accuracies: Sequence[float], candidate: str = "", *, seed: int = 10, stage: str = "blind", **values: Any
) -> list[dict[str, Any]]:
    """Rows of runs that went well, unless `values` say otherwise."""
    row = {"seed": seed, "arm": arm, "candidate": candidate, "diverged": False, "seconds": 2.0, "cpu_seconds": 1.5}
    row |= {"setting": HOME, "stage": stage, "definition": SMALL.definition, **values}
    return [row | {"rate": rate, "accuracy": value} for rate, value in zip(RATES, accuracies, strict=True)]


def study_of(folder: Path, rows: Sequence[dict[str, Any]], choices: dict[str, str]) -> Study:
    """A study of two small settings with some rows and choices."""
    study = Study(folder, {HOME: SMALL, "wide": WIDE}, ["lora", "none", "soft_frobenius"])
    for row in rows:
        append_row(study.path(row["setting"]), row)
    write_rows(
        study.choices_path,
        [{"arm": arm, "candidate": candidate, OURS: arm == "soft_frobenius"} for arm, candidate in choices.items()],
    )
    return study


def test_a_range_is_the_longest_run_of_consecutive_rates() -> None:
    rows = rows_of("none", (0.80, 0.70, 0.79, 0.80))
    cells = by_arm(rows)["none"]
    assert good_range(cells, 0.79) == [0.1, 1.0]
    assert good_range(cells, 0.80) == [0.001]
    assert good_range(cells, 0.81) == []
    rows += rows_of("none", (0.80, 0.88, 0.79, 0.80), seed=11)
    assert good_range(by_arm(rows)["none"], 0.79) == list(RATES)
    rows[6]["diverged"] = True
    assert good_range(by_arm(rows)["none"], 0.79) == [0.001, 0.01]
    assert best_rate(by_arm(rows)["none"]) == 0.001


def test_widths_are_in_decades() -> None:
    assert decades([0.01, 0.0316, 0.1, 0.316]) == 1.5
    assert decades([0.0316, 0.1]) == 0.5
    assert decades([0.1]) == 0
    assert math.isnan(decades([]))


def test_summary_of_arms_by_hand() -> None:
    rows = rows_of("lora", (0.70, 0.80, 0.50, 0.50)) + rows_of("lora", (0.70, 0.82, 0.50, 0.50), seed=11)
    rows += rows_of("none", (0.70, 0.80, 0.85, 0.50)) + rows_of("none", (0.70, 0.80, 0.89, 0.44), seed=11)
    rows[-1].update(diverged=True, accuracy=None)
    lora, none = summarize_arms(by_arm(rows))
    assert (lora["best_rate"], lora["accuracy"], lora["range"]) == (0.01, pytest.approx(0.81), [])
    assert math.isnan(lora["decades"])
    assert (none["best_rate"], none["accuracy"], none["range"], none["decades"]) == (0.1, pytest.approx(0.87), [0.1], 0)
    # By seed 0.05 and 0.07 at the best rates; 12.706 = t(0.975, 1 degree of freedom), the mean's error is 0.01.
    assert none["minus_lora"] == pytest.approx((0.06, 12.706 * 0.01), rel=1e-4)
    assert none["at_loras_rate"] == pytest.approx((-0.01, 12.706 * 0.01), rel=1e-4)
    # At a rate of 1: 0 and -0.5.
    assert none["least"] == pytest.approx((-0.25, 12.706 * 0.25), rel=1e-4)
    assert none["least_rate"] == 1.0
    assert (none["diverged"], none["runs"]) == (1, 8)
    assert lora["minus_lora"] == (0, 0)


def test_the_worst_rate_of_one_seed_needs_no_interval() -> None:
    rows = rows_of("lora", (0.7, 0.8, 0.5, 0.5)) + rows_of("none", (0.72, 0.77, 0.5, 0.6))
    _, none = summarize_arms(by_arm(rows))
    assert none["least_rate"] == 0.01
    assert none["least"][0] == pytest.approx(-0.03)
    assert math.isnan(none["least"][1])


def test_arms_without_a_good_rate_have_no_best_one() -> None:
    lora, none = summarize_arms(by_arm(rows_of("lora", [0.5] * 4, diverged=True) + rows_of("none", [0.5] * 4)))
    assert (lora["best_rate"], lora["accuracy"], lora["diverged"]) == (None, 0, 4)
    assert all(math.isnan(mean) for mean in (*lora["minus_lora"], *none["minus_lora"]))


def test_choices_are_the_widest_range_near_the_best_of_all_arms_and_then_the_best_accuracy() -> None:
    rows = rows_of("lora", (0.70, 0.80, 0.50, 0.50))
    rows += rows_of("lora + weight decay", (0.5, 0.6, 0.5, 0.5), "decay 0.1")
    rows += rows_of("lora + weight decay", (0.5, 0.7, 0.5, 0.5), "decay 1")
    rows += rows_of("none", (0.79, 0.79, 0.80, 0.1))
    rows += rows_of("soft_polar", (0.5, 0.8, 0.5, 0.5), "bound 0.2, warm-up 1")
    rows += rows_of("soft_polar", (0.5, 0.79, 0.79, 0.5), "bound 0.2, warm-up 20")
    rows += rows_of("soft_polar", [0.5] * 4, "bound 0.3, warm-up 20")
    rows += rows_of("soft_frobenius", (0.5, 0.80, 0.79, 0.5), CHOSEN)
    chosen = {row["arm"]: row for row in choose(rows)}
    assert {arm: row["candidate"] for arm, row in chosen.items()} == {
        "lora": "",
        "lora + weight decay": "decay 1",
        "none": "",
        "soft_frobenius": CHOSEN,
        "soft_polar": "bound 0.2, warm-up 20",
    }
    assert chosen["lora + weight decay"]["decades"] is None
    assert chosen["soft_frobenius"]["decades"] == chosen["soft_polar"]["decades"] == 1
    # As wide, within two points as well, and better at its best rate; no arm without a normalisation is ours.
    assert [arm for arm, row in chosen.items() if row[OURS]] == ["soft_frobenius"]


def test_a_choice_that_is_as_wide_within_a_point_is_made_by_two() -> None:
    rows = rows_of("lora", (0.70, 0.80, 0.50, 0.50))
    rows += rows_of("soft_polar", (0.5, 0.80, 0.77, 0.5), "bound 0.2, warm-up 1")
    rows += rows_of("soft_polar", (0.5, 0.79, 0.785, 0.5), "bound 0.2, warm-up 20")
    assert choose(rows)[-1]["candidate"] == "bound 0.2, warm-up 20"


def test_report_takes_whole_arms_alone_and_other_methods_from_todays_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = rows_of("lora", (0.70, 0.80, 0.50, 0.50))
    lora[2]["diverged"] = True
    ours = rows_of("soft_frobenius", (0.70, 0.79, 0.785, 0.50), CHOSEN)
    in_wide = {"setting": "wide", "definition": WIDE.definition}
    wide = rows_of("soft_frobenius", (0.70, 0.78, 0.77, 0.50), CHOSEN, **in_wide)
    rows = lora + ours + wide + rows_of("none", [0.9] * 4)[:3]
    study = study_of(tmp_path, rows, {"lora": "", "none": "", "soft_frobenius": CHOSEN})
    report(study, tmp_path / "results")
    printed = capsys.readouterr().out
    assert "today, blind: left out until all of their runs are made: none\n" in printed
    assert "today, stage blind (seeds 10; test rows): mean accuracy in percent by rate" in printed
    accuracies = [line.split() for line in printed.splitlines() if line.startswith("lora") and "70.0" in line]
    assert accuracies == [["lora", "70.0", "80.0", "50.0!", "50.0"]] * 2
    [in_today, _] = [line.split()[5:] for line in printed.splitlines() if line.startswith("soft_") and "/4" in line]
    assert in_today == ["0.01", "0.790", "-0.010", "-0.010", "-0.010", "at", "0.01", "0", "0/4", "1.5"]
    assert read_rows(tmp_path / "results" / "stability_today.jsonl") == lora + ours
    assert read_rows(tmp_path / "results" / "stability_wide.jsonl") == wide
    picture = (tmp_path / "results" / "stability.svg").read_text()
    assert f"hyperadapt: soft_frobenius ({CHOSEN})" in picture
    assert "LoRA" in picture


def test_a_study_without_a_normalised_arm_has_a_picture_too(tmp_path: Path) -> None:
    study = study_of(tmp_path, rows_of("lora", (0.70, 0.80, 0.50, 0.50)), {"lora": ""})
    report(study, tmp_path / "results")
    assert "hyperadapt" not in (tmp_path / "results" / "stability.svg").read_text()


def test_rows_of_the_choosing_stage_are_kept_apart_and_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("lora", (0.70, 0.80, 0.50, 0.50), seed=0, stage="choose")
    report(study_of(tmp_path, rows, {}), tmp_path / "results")
    assert "today, stage choose (seeds 0; validation rows)" in capsys.readouterr().out
    [file] = (tmp_path / "results").iterdir()
    assert file.name == "stability_today_choose.jsonl"
    assert read_rows(file) == rows


def test_blind_rows_of_another_choice_are_refused(tmp_path: Path) -> None:
    rows = rows_of("soft_frobenius", (0.70, 0.79, 0.785, 0.50), CHOSEN)
    study = study_of(tmp_path, rows, {"soft_frobenius": "bound 0.2, warm-up 20"})
    with pytest.raises(SystemExit, match=rf"of soft_frobenius \({CHOSEN}\), but 'bound 0.2, warm-up 20' was chosen"):
        report(study, tmp_path / "results")


def test_hypernetworks_alone_are_run_where_nothing_else_differs(tmp_path: Path) -> None:
    study = study_of(tmp_path, [], {"lora": "", "none": "", "soft_frobenius": CHOSEN})
    assert {run.arm for run in study.runs("wide", "blind")} == {"none", "soft_frobenius"}
    assert len(study.runs("wide", "blind")) == 2 * len(RATES)
    assert len(study.runs(HOME, "choose")) == (1 + 1 + 3) * len(RATES)


def test_a_run_made_twice_counts_once(tmp_path: Path) -> None:
    rows = rows_of("lora", (0.70, 0.80, 0.50, 0.50))
    study = study_of(tmp_path, [*rows, rows[0] | {"seconds": 9.0}], {"lora": ""})
    assert study.rows(HOME, "blind") == rows


def test_remaining_time_is_told_by_the_medians_of_the_arms() -> None:
    runs = [Run(0, arm, "", 0.1) for arm in ("lora", "lora", "dora")]
    assert seconds_of(runs, {}) is None
    assert seconds_of(runs, {"lora": [1.0, 2.0, 30.0], "none": [4.0, 5.0]}) == 2 + 2 + 4


def test_seeds_of_the_stages_are_apart_and_every_setting_is_its_own() -> None:
    for setting in SETTINGS.values():
        assert not set(STAGES["choose"].seeds(setting)) & set(STAGES["blind"].seeds(setting))
    assert len({setting.definition for setting in SETTINGS.values()}) == len(SETTINGS)
    assert {stage.split for stage in STAGES.values()} == {"validation", "test"}
