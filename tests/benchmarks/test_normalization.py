"""The benchmarks of the normalisations run and save complete rows; what they measure here means nothing."""

from pathlib import Path

import pytest

from benchmarks import launches, normalization, numerics
from benchmarks.common.rows import read_rows
from benchmarks.launches import core_calls
from hyperadapt.normalization import NORMALIZATIONS
from hyperadapt.normalization.formulas import METHODS

ENVIRONMENT = {"torch", "transformers", "peft", "hyperadapt", "python", "device", "threads", "date", "commit"}


def test_normalization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "qwen2.5-0.5b", "--ranks", "4", "--tasks", "1", "--methods", "frobenius", "sinkhorn"]
    arguments += ["--rounds", "1", "--no-compile", "--skip-svd", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["normalization", *arguments])
    normalization.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    # Two arms of the dense norm, two of the spectral one, two of Sinkhorn alone; two arms in two passes of two methods.
    assert len(rows) == 2 + 2 + 2 + 2 * 2 * 2
    for row in rows:
        assert row.keys() >= ENVIRONMENT | {"model", "r", "tasks", "method", "dtype", "pass", "arm", "ratio_to_fused"}
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["numerics", "--seeds", "1", "--output", str(tmp_path)])
    numerics.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["method"], row["of"]) for row in rows] == 2 * [
        (method, kind) for method in NORMALIZATIONS for kind in ("update", "gradients")
    ]
    for row in rows:
        errors = [row[case] for case in numerics.CASES if case not in ("zero", "cancelling")]
        if row["of"] == "gradients":
            assert all(error < float("inf") for error in errors)
            continue
        assert row["zero"] is None
        # What the documentation says of the hardest spectra.
        assert max(errors) < (2e-2 if row["method"] == "whitening" else 1e-4)


def test_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["launches", "--output", str(tmp_path)])
    launches.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    counted = {
        row["method"]: (row["forward"], row["backward"])
        for row in rows
        if row.get("by") == "kernels" and "method" in row
    }
    assert counted.keys() == set(NORMALIZATIONS)
    for method, calls in counted.items():
        if METHODS[method].kernel:
            number = METHODS[method].kernel == "scale"
            assert calls == ((1, 1) if number else (2, 2)), method
    # Without a normalisation nothing reads the factors: ones are made, and filled in.
    assert counted["none"] == (2, 0)
    steps = {(row["arm"], row["by"]): row["step"] for row in rows if row.get("tasks") == 1}
    for name in ("soft_frobenius", "soft_polar"):
        counts = [sum(core_calls(name, serve)) for serve in (True, False)]
        # What kernels save is all of a step's difference.
        steps_by = [steps[f"hyperadapt {name}", by] for by in ("kernels", "formulas")]
        assert steps_by[1] - steps_by[0] == counts[1] - counts[0] > 0
    assert steps["lora", "kernels"] == steps["lora", "formulas"] < steps["hyperadapt soft_polar", "kernels"]
    assert steps["hyperadapt soft_frobenius", "formulas"] < steps["hyperadapt soft_polar", "formulas"]
