"""The study of first steps: its arms start alike, it runs and resumes, and its report follows from the rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.rows import read_rows
from benchmarks.first_steps import __main__ as first_steps
from benchmarks.first_steps.__main__ import DEFAULT_RATE, best_rate
from benchmarks.first_steps.report import report
from benchmarks.first_steps.runs import ARMS, LEARNED, LORA, TEXT, build, load_small, of_arm, training_batches
from tests.support.helpers import minilm


def row(stage: str, arm: str, rate: float, seed: int, *values: float, of: str = "a") -> dict[str, Any]:
    accuracies = {str(step): [value] for step, value in enumerate(values, 1)}
    return {
        "stage": stage,
        "set": of,
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "accuracies": accuracies,
        "majority": 0.5,
    }


def test_all_arms_start_with_one_classifier_on_the_base_model() -> None:
    minilm()
    data = load_small(["sms_spam", "trump_clinton"], "validation", 12, 4)
    [first, *others] = [
        build(arm, data, 3).eval()(**of_arm(arm, data.evaluation[1][0])).logits.detach() for arm in ARMS
    ]
    assert all(torch.equal(first, other) for other in others)
    # A row competes among its own task's classes.
    assert first.isfinite().tolist() == 4 * [[False, False, True, True]]
    assert not torch.equal(first, build(LORA, data, 4)(**of_arm(LORA, data.evaluation[1][0])).logits)
    batches = training_batches(data, 5, 0)
    assert [len(batch["labels"]) for batch in batches] == [16] * 5
    # An epoch has each row once.
    epoch = torch.cat([batch["tasks"] for batch in batches])[: len(data.train)]
    assert torch.bincount(epoch).tolist() == [12, 12]


def test_fast_form_runs_resumes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    minilm()
    monkeypatch.setattr("sys.argv", ["first_steps", "--fast", "--output", str(tmp_path)])
    monkeypatch.setattr(first_steps, "RATES", (2e-3, 5e-3))
    first_steps.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    best = {arm: best_rate(arm, ["candidates"], rows) for arm in ARMS}
    assert best[TEXT] == best[LEARNED]
    assert [(one["stage"], one["arm"], one["rate"]) for one in rows] == [
        *(("tune", arm, rate) for arm in (LORA, LEARNED) for rate in (2e-3, 5e-3)),
        *(("test", arm, rate) for arm in ARMS for rate in dict.fromkeys((DEFAULT_RATE, best[arm]))),
    ]
    assert all(list(one["accuracies"]) == ["1", "2"] for one in rows)
    output = capsys.readouterr().out
    first_steps.main()
    assert output.endswith(capsys.readouterr().out)
    monkeypatch.setitem(first_steps.FAST, "rows", 5)
    with pytest.raises(SystemExit, match=r"has rows with rows=6, not 5\. Choose another --output\."):
        first_steps.main()


def test_the_best_rate_is_that_of_all_sets_and_steps() -> None:
    rows = [row("tune", LORA, rate, 0, 0.5, rate) for rate in first_steps.RATES]
    assert best_rate(LORA, ["a"], rows) == 2e-2
    rows += [row("tune", LORA, rate, 0, 0.5, 0.5 - 2 * rate, of="b") for rate in first_steps.RATES]
    assert best_rate(LORA, ["a", "b"], rows) == 5e-4
    with pytest.raises(SystemExit, match=r"LoRA has not been tuned at the rates \[0\.0005, .*--stage tune first"):
        best_rate(LORA, ["a", "b"], rows[:5])


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("tune", LORA, 2e-3, 9, 0.5, value, of=of) for of, value in (("a", 0.6), ("b", 0.8))]
    rows += [row("tune", LORA, 5e-3, 9, 0.5, 0.6)]
    for seed in (0, 1):
        for of in "ab":
            rows += [row("test", LORA, 2e-3, seed, 0.5, 0.5 + 0.1 * seed, of=of)]
            rows += [
                row("test", LEARNED, 2e-3, seed, 0.4, 0.5, of=of),
                row("test", LEARNED, 1e-2, seed, 0.7, 0.9, of=of),
            ]
    report(rows, 2e-3, tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "LoRA 0.002 0.500 0.700" in lines
    # Not all sets have been run.
    assert "LoRA 0.005 - -" in lines
    table = lines[lines.index("mean: test accuracy, 95% interval over seeds; most frequent class 0.500") :]
    assert table[1] == "arm rate 1 steps 2 steps seeds"
    assert table[2] == "LoRA 0.002 0.500 ± 0.000 0.550 ± 0.635 2"
    assert "hyperadapter - LoRA -0.100 ± 0.000 -0.050 ± 0.635 at the default rate" in table
    assert "hyperadapter - LoRA +0.200 ± 0.000 +0.350 ± 0.635 each at its best rate" in table
    assert len(read_rows(tmp_path / "first_steps.jsonl")) == len(rows)
    with pytest.raises(SystemExit, match=r"There are no rows yet"):
        report([], 2e-3, tmp_path)
