"""The benchmarks of the normalisations run and save complete rows; what they measure here means nothing."""

from pathlib import Path

import pytest

from benchmarks import normalization, numerics
from benchmarks.rows import read_rows
from hyperadapt.normalization import NORMALIZATIONS

ENVIRONMENT = {"torch", "transformers", "peft", "hyperadapt", "python", "device", "threads", "date", "commit"}


def test_normalization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "qwen2.5-0.5b", "--ranks", "4", "--tasks", "1", "--methods", "frobenius", "sinkhorn"]
    arguments += ["--rounds", "1", "--no-compile", "--skip-svd", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["normalization", *arguments])
    normalization.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    # Two arms of the dense norm, two of the spectral one, Sinkhorn alone, and two arms in two passes for both methods.
    assert len(rows) == 2 + 2 + 1 + 2 * 2 * 2
    for row in rows:
        assert row.keys() >= ENVIRONMENT | {"model", "r", "tasks", "method", "dtype", "pass", "arm", "ratio_to_fused"}
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "SEEDS", 1)
    monkeypatch.setattr("sys.argv", ["numerics", "--output", str(tmp_path)])
    numerics.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == 2 * list(NORMALIZATIONS)
    for row in rows:
        assert row["zero"] is None
        errors = [row[case] for case in numerics.CASES if case not in ("zero", "cancelling")]
        # What the documentation says of the hardest spectra.
        assert max(errors) < (2e-2 if row["method"] == "whitening" else 1e-4)
