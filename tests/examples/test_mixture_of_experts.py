"""The example of experts, from training to exports that plain PEFT loads."""

from pathlib import Path

import pytest

from examples import mixture_of_experts


def test_mixture_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mixture_of_experts", "--steps", "25", "--output", str(tmp_path)])
    mixture_of_experts.main()
    head, *rows, _ = [line.split() for line in capsys.readouterr().out.strip().splitlines()[-5:]]
    assert head == ["task", "base", "model", "hyperadapter", "its", "LoRA"]
    assert [row[0] for row in rows] == list(mixture_of_experts.TASKS)
    for _, base, adapted, lora in rows:
        # It has begun to learn; the last example of a few may be a tie.
        assert float(adapted) > float(base) + 0.05
        assert float(lora) == pytest.approx(float(adapted), abs=0.005)
