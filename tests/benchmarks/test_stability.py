"""The stability study runs, resumes, and its report says what follows from the rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import stability
from benchmarks.rows import read_rows
from benchmarks.stability_arms import ARMS, build
from benchmarks.stability_report import report
from benchmarks.stability_runs import (
    TASKS,
    StabilityData,
    count_spikes,
    evaluate,
    run_once,
    steps_to,
    summarize,
)
from benchmarks.stability_summary import by_arm, good_range, summarize_arms
from examples.support.text_tasks import encoder_path
from hyperadapt.normalization import NORMALIZATIONS

RATES = (0.001, 0.01, 0.1, 1.0)


@pytest.fixture(scope="module")
def data() -> StabilityData:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return StabilityData(validation_rows=2)


def row(arm: str, rate: float, accuracy: float | None, seed: int = 0, **values: Any) -> dict[str, Any]:
    """A row of a run that went well, unless `values` say otherwise."""
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "accuracy": accuracy,
        "loss": 0.5,
        "largest_gradient": 2.0,
        "steps_to_loss": 30,
        "spikes": 0,
        "failure": None,
        "diverged": False,
        **values,
    }


def rows_of(arm: str, *accuracies: float, seed: int = 0) -> list[dict[str, Any]]:
    return [row(arm, rate, accuracy, seed) for rate, accuracy in zip(RATES, accuracies, strict=True)]


def test_fast_form_runs_resumes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: StabilityData
) -> None:
    monkeypatch.setattr("sys.argv", ["stability", "--fast", "--output", str(tmp_path)])
    stability.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {(row["arm"], row["rate"], row["seed"]) for row in rows} == {
        (arm, rate, 0) for arm in stability.FAST["arms"] for rate in (1e-3, 1e-2)
    }
    for row in rows:
        assert row.keys() >= {"torch", "date", "commit", "steps", "parameters", "largest_gradient", "train_end"}
        assert 0 <= row["accuracy"] <= 1
        assert row["failure"] is None
        # Nothing is random but the batches, and all arms start at the base model.
        assert row["train_start"] == rows[0]["train_start"]
    assert read_rows(tmp_path / "stability.jsonl") == rows
    assert {path.suffix for path in tmp_path.glob("stability.*")} == {".jsonl", ".svg"}

    # A row that is missing is run again, and is the same; nothing else is.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[1:]))
    capsys.readouterr()
    stability.main()
    assert capsys.readouterr().out.count("seconds") == 1
    again = read_rows(tmp_path / "rows.jsonl")
    assert again[:-1] == rows[1:]
    assert again[-1] | {"seconds": 0} == rows[0] | {"seconds": 0}

    monkeypatch.setitem(stability.FAST, "steps", 4)
    with pytest.raises(SystemExit, match=r"has rows with steps=3, not 4"):
        stability.main()


def test_every_arm_but_one_starts_at_the_base_model(data: StabilityData) -> None:
    start = data.base_loss, data.base_accuracy
    for name, arm in ARMS.items():
        model = build(arm, data.base, TASKS, seed=0).eval()
        measured = evaluate(model, data.validation, takes_tasks=arm.config is not None)
        assert (measured == start) == (name != "none, hyperfan for B too"), name
    normalizations = {arm.config["normalization"] for arm in ARMS.values() if arm.config}
    assert normalizations == set(NORMALIZATIONS)


def test_changed_heads_keep_what_a_is_at_the_start(data: StabilityData) -> None:
    for name in ("none", "none, nothing shared", "none, shared start", "none + weight norm"):
        model = build(ARMS[name], data.base, TASKS, seed=0)
        hypernetwork = model.base_model.hyperadapter_networks["default"].hypernetwork
        head, shared = hypernetwork.heads["A_384_r8"], hypernetwork.shared["A_384x384_r8"]
        with torch.no_grad():
            variances = float(head(torch.randn(200, head.weight.shape[1])).var()), float(shared.var())
        # Hyperfan: 1 / fan-in in total.
        assert sum(variances) == pytest.approx(1 / 384, rel=0.1)
        assert (variances[1] == 0) == (name == "none, nothing shared") == (not shared.requires_grad)
        assert (variances[0] == 0) == (name == "none, shared start")


def test_plain_heads_are_linear_layers_alone(data: StabilityData) -> None:
    model = build(ARMS["none, plain heads"], data.base, TASKS, seed=0)
    hypernetwork = model.base_model.hyperadapter_networks["default"].hypernetwork
    assert {type(head) for head in hypernetwork.heads.values()} == {torch.nn.Linear}
    trainable = {name for name, parameter in hypernetwork.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("shared") for name in trainable)
    assert {f"heads.{factor}_384_r8.{part}" for factor in "AB" for part in ("weight", "bias")} <= trainable


def test_a_run_stops_where_something_is_not_finite(data: StabilityData) -> None:
    batches = data.training_batches(3, seed=0)
    batches[1] = batches[1] | {"input_ids": torch.full_like(batches[1]["input_ids"], math.nan)}
    measured = run_once(ARMS["none"], data, batches, rate=1e-3, seed=0)
    assert measured["failure"] == "loss"
    assert measured["failed_step"] == 2
    assert measured["diverged"]
    assert measured["accuracy"] is measured["loss"] is measured["train_end"] is None
    assert measured["train_max"] == measured["train_start"]
    json.dumps(measured, allow_nan=False)


def test_summaries_of_losses() -> None:
    losses = [1.0] * 10 + [2.0, 2.1, 0.4] + [0.5] * 10
    assert count_spikes(losses) == 1
    assert summarize(losses) == {"train_start": 1.0, "train_end": 0.5, "train_max": 2.1}
    # (2.1 + 0.4 + 8 · 0.5) / 10 = 0.65, and one step later (0.4 + 9 · 0.5) / 10 = 0.49.
    assert steps_to(losses, 0.6) == 22
    assert steps_to(losses, 0.65001) == 21
    assert steps_to(losses, 0.4) is None


def test_a_range_is_the_longest_run_of_consecutive_rates() -> None:
    cells = by_arm(rows_of("none", 0.80, 0.70, 0.79, 0.80))["none"]
    assert good_range(cells, 0.79) == [0.1, 1.0]
    assert good_range(cells, 0.80) == [0.001]
    assert good_range(cells, 0.81) == []
    rows = rows_of("none", 0.80, 0.70, 0.79, 0.80) + rows_of("none", 0.80, 0.88, 0.79, 0.80, seed=1)
    assert good_range(by_arm(rows)["none"], 0.79) == list(RATES)
    rows[6]["diverged"] = True
    assert good_range(by_arm(rows)["none"], 0.79) == [0.001, 0.01]


def test_summary_of_arms_by_hand() -> None:
    rows = rows_of("lora", 0.70, 0.80, 0.50, 0.50) + rows_of("none", 0.70, 0.79, 0.785, 0.50)
    rows += rows_of("deep: none", 0.70, 0.60, 0.5, 0.50) + rows_of("deep: spectral", 0.77, 0.77, 0.76, 0.73)
    rows[3].update(diverged=True, accuracy=None, loss=None, failure="loss", steps_to_loss=None, spikes=2)
    rows[5].update(loss=0.25, largest_gradient=7.0, steps_to_loss=20)
    lora, none, deep_none, deep_spectral = summarize_arms(rows)
    assert (lora["best_rate"], lora["accuracy"], lora["range"], lora["width"]) == (0.01, 0.80, [0.01], 1.0)
    assert (lora["diverged"], lora["not_finite"], lora["spikes"]) == (0.25, 1, 0.5)
    assert none["range"] == [0.01, 0.1]
    assert (none["loss"], none["gradient_at_best"], none["gradient"], none["steps_to_loss"]) == (0.25, 7.0, 7.0, 20)
    assert (none["width"], none["by_lora"], none["by_none"]) == pytest.approx((10, 10, 1))
    # 0.79 is within a point of 0.80, the best of all; 0.785 is within two.
    assert (none["width_of_best_arm"], none["width_2_points_of_best_arm"]) == pytest.approx((1, 10))
    assert (deep_none["width"], deep_none["width_of_best_arm"]) == (1, 0)
    assert deep_spectral["range"] == [0.001, 0.01, 0.1]
    assert (deep_spectral["width"], deep_spectral["by_lora"], deep_spectral["by_none"]) == pytest.approx((100,) * 3)
    assert deep_spectral["width_2_points"] == pytest.approx(100)

    for member in rows[:4]:
        member["diverged"] = True
    lora, none, *_ = summarize_arms(rows)
    assert (lora["best_rate"], lora["width"]) == (None, 0)
    assert all(math.isnan(mean) for mean in (*lora["minus_lora"], *none["minus_lora"]))
    assert math.isnan(none["by_lora"])


def test_differences_to_lora_are_by_seed() -> None:
    rows = rows_of("lora", 0.70, 0.80, 0.50, 0.50) + rows_of("none", 0.70, 0.79, 0.85, 0.50)
    # LoRA's best rate is 0.01, that of none 0.1: 0.05 and 0.07 apart.
    rows += rows_of("lora", 0.70, 0.82, 0.50, 0.50, seed=1) + rows_of("none", 0.70, 0.79, 0.89, 0.50, seed=1)
    _, none = summarize_arms(rows)
    # 12.706 = t(0.975, 1 degree of freedom); the mean's standard error is 0.01.
    assert none["minus_lora"] == pytest.approx((0.06, 12.706 * 0.01), rel=1e-4)


def test_report_prints_the_complete_seeds_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("lora", 0.70, 0.80, 0.50, 0.50) + rows_of("none", 0.70, 0.79, 0.785, 0.50)
    rows[2]["diverged"] = True
    report([*rows, row("lora", 0.001, 0.9, seed=1)], tmp_path)
    output = capsys.readouterr().out.splitlines()
    assert output[1].startswith("seeds 0;")
    [summary, accuracies] = [line.split() for line in output if line.startswith("lora")]
    assert summary[1:9] == ["0.01", "0.800", "0.500", "+0.000", "0.01", "to", "0.01", "1"]
    assert accuracies[1:] == ["70.0", "80.0", "50.0!", "50.0"]
    assert read_rows(tmp_path / "stability.jsonl") == rows
    with pytest.raises(ValueError, match=r"rows=\[\].*without --report"):
        report([], tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
