"""The multi-task benchmark trains every arm as it says, resumes, and its report says what follows from the rows."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from benchmarks.common.fitting import fit
from benchmarks.common.rows import read_rows
from benchmarks.multitask import __main__ as multitask
from benchmarks.multitask import arms as multitask_arms
from benchmarks.multitask.arms import ARMS, build, run_arm
from benchmarks.multitask.data import MultitaskData
from benchmarks.multitask.report import by_fraction, differences, report
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import encoder_path, load_task

TASKS = ["sms_spam", "stereoset_rel"]


@pytest.fixture(scope="module")
def data() -> MultitaskData:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return MultitaskData(TASKS, train_rows=40, validation_rows=4, test_rows=4)


def row(arm: str, seed: int, accuracy: float, **values: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "fraction": 1.0,
        "rate": 0.001,
        "accuracy": accuracy,
        "accuracies": {"a": accuracy, "b": accuracy},
        "parameters": 100,
        "file_bytes": 400,
        "seconds": 1.0,
        **values,
    }


def test_fast_form_runs_resumes_and_refuses_other_settings(
    data: MultitaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["multitask", "--fast", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setitem(multitask.FAST, "arms", ["separate loras", "poly", "soft_frobenius"])
    monkeypatch.setitem(multitask.FAST, "seeds", [0])
    monkeypatch.setitem(multitask.FAST, "steps", 2)
    multitask.main()
    printed = capsys.readouterr().out
    # Three arms, at four rates each, then with two fractions.
    assert printed.count("validation seed 100") == 12
    assert printed.count("test seed 0") == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl", "tuning.jsonl", "multitask.jsonl", "multitask.svg",
    }  # fmt: skip
    assert len(read_rows(tmp_path / "multitask.jsonl")) == 18

    multitask.main()
    assert "seed 0 fraction" not in capsys.readouterr().out

    monkeypatch.setitem(multitask.FAST, "steps", 5)
    with pytest.raises(SystemExit, match="has rows with steps=2, not 5"):
        multitask.main()


def test_upper_layers_on_computed_states_are_the_whole_model(data: MultitaskData) -> None:
    tasks, tokenizer = [load_task(name) for name in TASKS], load_tokenizer()
    [encoded, _] = encode(tasks, "test", tokenizer, max_rows=4, max_length=24)
    [batch] = batches(encoded, tokenizer)
    del batch["tasks"]
    whole = load_matcher(tasks, tokenizer, torch.bfloat16)
    [states] = data.test[0]
    with torch.no_grad():
        expected = whole(**batch).logits
        actual = data.base(**{name: states[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    # The padding differs from batch to batch, so bfloat16 sums may be rounded otherwise: 2**-8 of cosines times 20.
    assert_close(actual, expected, atol=20 * 2**-8, rtol=0)


def test_tasks_have_equal_shares_and_arms_see_the_same_rows(data: MultitaskData) -> None:
    mixed = list(data.training_batches(1.0, 5, seed=1))
    assert len(mixed) == 5
    assert torch.cat([batch["tasks"] for batch in mixed]).bincount().tolist() == [40, 40]

    def rows(task: int | None) -> set[tuple[int, float]]:
        return {
            (task_id, round(float(states.float().sum()), 3))
            for batch in data.training_batches(0.25, 10, seed=1, task=task)
            for states, mask, task_id in zip(
                batch["input_ids"], batch["attention_mask"], batch["tasks"].tolist(), strict=True
            )
            for states in [states[mask.bool()]]
        }

    assert len(rows(None)) == 20
    assert rows(None) == rows(0) | rows(1)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_can_be_built(data: MultitaskData, name: str) -> None:
    model = build(ARMS[name], data, seed=0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert not any("base_layer" in name for name in trainable)


def test_separate_loras_share_the_steps(data: MultitaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def counted(model: torch.nn.Module, batches: Iterable[Any], number: int, rate: float) -> None:
        batches = list(batches)
        steps.append(len(batches))
        fit(model, batches, number, rate)

    monkeypatch.setattr(multitask_arms, "fit", counted)
    measured = run_arm(ARMS["separate loras"], data, fraction=1.0, steps=4, rate=1e-3, seed=0, split="test")
    assert steps == [2, 2]
    alone = build(ARMS["shared lora"], data, seed=0).get_nb_trainable_parameters()[0]
    assert measured["parameters"] == 2 * alone
    # Adapters are float32.
    assert measured["file_bytes"] == pytest.approx(8 * alone, rel=0.05)
    assert set(measured["accuracies"]) == set(TASKS)


def test_report_compares_seeds_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("separate loras", 0, 0.50),
        row("separate loras", 1, 0.60),
        row("soft_frobenius", 0, 0.55, parameters=25),
        row("soft_frobenius", 1, 0.65, parameters=25),
        row("soft_frobenius", 2, 0.99),
        row("none", 0, 0.52),
        row("none", 1, 0.62),
    ]
    arms = by_fraction(rows)[1.0]
    assert [row["seed"] for row in arms["soft_frobenius"]] == [0, 1]
    assert differences(arms, "soft_frobenius", "separate loras") == pytest.approx([0.05, 0.05])
    report(rows, [], tmp_path)
    printed = capsys.readouterr().out
    [line, pair] = [line for line in printed.splitlines() if line.startswith("soft_frobenius")]
    assert pair.split() == ["soft_frobenius", "minus", "none", "+0.030", "±", "0.000"]
    cells = line.split()
    # 12.7 = t(0.975, 1 degree of freedom): two seeds say little.
    assert cells[1:4] == ["0.600", "±", f"{12.706 * 0.05:.3f}"]
    assert cells[4:7] == ["+0.050", "±", "0.000"]
    assert "0.250" in cells
    assert not math.isnan(float(cells[-1]))


def test_report_refuses_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows=\[\]: there is nothing to report"):
        report([], [], tmp_path)
