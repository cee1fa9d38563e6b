"""The study of recurrent networks runs, its arms start alike and keep their bounds, and its measures are right."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.common.rows import read_rows
from benchmarks.recurrent_memory import __main__ as recurrent_memory
from benchmarks.recurrent_memory.__main__ import (
    ARMS,
    BOUND,
    HIDDEN,
    WINDOW,
    Networks,
    adding_problem,
    run,
    steps_to_solve,
    train,
)
from benchmarks.recurrent_memory.report import CHANCE


def test_fast_form_writes_rows_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recurrent_memory", "--fast", "--output", str(tmp_path)])
    recurrent_memory.main()
    rows = read_rows(tmp_path / "recurrent_memory.jsonl")
    fast = recurrent_memory.FAST
    assert [(row["length"], row["arm"], row["rate"], row["seed"]) for row in rows] == [
        (6, arm, rate, seed) for arm in ARMS for rate in fast["rates"] for seed in range(2)
    ]
    lines = capsys.readouterr().out.splitlines()
    for first, second, line in zip(rows[::2], rows[1::2], lines[3:-1], strict=True):
        assert first.keys() >= {"torch", "commit", "steps", "final_loss", "steps_to_solve", "seconds"}
        assert first["finite"]
        assert line.startswith(f"6       {first['arm']}")
        assert line.split()[-1] == f"{max(first['largest_gradient'], second['largest_gradient']):.3g}"
    assert {path.suffix for path in tmp_path.glob("recurrent_memory.*")} == {".jsonl", ".svg"}


def test_adding_problem() -> None:
    sequences, sums = adding_problem(4000, 9, torch.Generator().manual_seed(0))
    numbers, marks = sequences.unbind(-1)
    assert bool((marks[:, :4].sum(1) == 1).all())
    assert bool((marks[:, 4:].sum(1) == 1).all())
    assert bool((marks.sum(0) > 500).all())
    assert sums.tolist() == pytest.approx(
        [float(row[mark == 1].sum()) for row, mark in zip(numbers, marks, strict=True)]
    )
    assert float((sums - 1).square().mean()) == pytest.approx(CHANCE, rel=0.05)


def test_a_network_of_a_batch_is_torchs_rnn_and_starts_as_in_other_arms() -> None:
    sequences, _ = adding_problem(5, 7, torch.Generator().manual_seed(0))
    outputs = {name: Networks(arm, 2)(torch.stack([sequences] * 2)).detach() for name, arm in ARMS.items()}
    for name, arm in ARMS.items():
        if arm.orthogonal_start:
            # The ridge of whitening.
            torch.testing.assert_close(outputs[name], outputs["none"], rtol=0, atol=1e-4)
    for seed in range(2):
        torch.manual_seed(seed)
        cell, head = torch.nn.RNN(2, HIDDEN, nonlinearity="relu", batch_first=True), torch.nn.Linear(HIDDEN, 1)
        torch.nn.init.zeros_(cell.bias_ih_l0)
        torch.nn.init.zeros_(cell.bias_hh_l0)
        expected = head(cell(sequences)[0][:, -1])[:, 0].detach()
        torch.testing.assert_close(outputs["none, default start"][seed], expected)


def test_normalised_weights_keep_their_bounds_at_a_high_rate() -> None:
    for name, arm in ARMS.items():
        networks = Networks(arm, 2)
        train(networks, arm, rate=0.1, length=4, steps=5)
        recurrent = networks.recurrent.detach()
        singular = torch.linalg.svdvals(recurrent)
        if name == "spectral":
            torch.testing.assert_close(singular[:, 0], torch.ones(2))
            assert bool((singular[:, -1] < 0.9).all())
        elif name in ("whitening", "torch orthogonal"):
            torch.testing.assert_close(singular, torch.ones(2, HIDDEN), rtol=0, atol=0.01)
        elif name == "soft_frobenius":
            assert bool((recurrent.norm(dim=(1, 2)) < BOUND).all())
        else:
            assert bool((singular[:, 0] > 1.5).all())


def test_a_network_that_fails_is_frozen_and_leaves_the_others_alone() -> None:
    arm = ARMS["none, clipped"]
    alone, both = Networks(arm, 1), Networks(arm, 2)
    with torch.no_grad():
        both.input[1] *= 1e30
    start = both.recurrent[1].detach().clone()
    expected = train(alone, arm, rate=1e-2, length=4, steps=4)
    losses, norms = train(both, arm, rate=1e-2, length=4, steps=4)
    assert not losses[:, 1].isfinite().any()
    assert torch.equal(both.recurrent[1].detach(), start)
    torch.testing.assert_close(losses[:, :1], expected[0])
    torch.testing.assert_close(norms[:, :1], expected[1])


def test_clipping_changes_only_large_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def recurrent(clip: float | None) -> torch.Tensor:
        arm = ARMS["none"]._replace(clip=clip)
        networks = Networks(arm, 1)
        train(networks, arm, rate=1e-2, length=4, steps=3)
        return networks.recurrent.detach()

    assert torch.equal(recurrent(None), recurrent(1e6))
    assert not torch.equal(recurrent(None), recurrent(0.1))


def test_steps_to_solve_is_the_end_of_the_first_window_below_the_threshold() -> None:
    losses = torch.cat((torch.full((20,), 0.1), torch.zeros(WINDOW)))
    # n of the window's losses are 0.1, and their mean is below 0.02 if n < 10.
    assert steps_to_solve(losses) == WINDOW + 11
    assert steps_to_solve(losses[: WINDOW + 10]) is None
    assert steps_to_solve(torch.zeros(WINDOW - 1)) is None
    assert steps_to_solve(torch.full((WINDOW,), math.nan)) is None


def test_a_run_is_the_same_again_and_has_no_numbers_that_json_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, again = ([row | {"seconds": 0} for row in run("whitening", 1e-2, 5, 2, 3)] for _ in range(2))
    assert rows == again
    for row in run("none", 1e30, 5, 2, 3):
        assert not row["finite"]
        assert row["final_loss"] is None
        json.dumps(row, allow_nan=False)
