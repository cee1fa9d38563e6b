"""The transfer benchmark: its arms, their batches and texts, and that it runs, far too short to learn anything."""

from pathlib import Path

import pytest
import torch

from benchmarks import transfer
from benchmarks.rows import read_rows
from benchmarks.transfer_arms import add_hyperadapter, make_trainer
from benchmarks.transfer_baselines import task_batches
from benchmarks.transfer_data import BLANK, UNRELATED, descriptions_for, load_data
from benchmarks.transfer_report import interval
from examples.support.task_descriptions import DESCRIPTIONS
from examples.support.text_tasks import encoder_path

ENVIRONMENT = {"torch", "transformers", "peft", "hyperadapt", "python", "device", "threads", "date", "commit"}

KINDS = ("true", "shuffled", "random", "blank")


def test_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("sys.argv", ["transfer", "--fast", "--output", str(tmp_path)])
    transfer.main()
    rows = [row for path in tmp_path.glob("rows_0_*.jsonl") for row in read_rows(path)]
    zero_shot = {"majority", "base", "lora", "poly", *(f"hyperadapt {kind}" for kind in KINDS)}
    few_shot = {"hyperadapt, examples", "lora r=8, examples"}
    cells = {(row["arm"], row["task"], row["n"]) for row in rows}
    assert len(cells) == len(rows)
    assert cells == {
        *((arm, "nyt_sent", 0) for arm in zero_shot),
        *((arm, "nyt_sent", 8) for arm in few_shot),
        *((arm, "trained", 0) for arm in ("majority", "base", "lora", "poly", "hyperadapt true")),
    }
    for row in rows:
        assert row.keys() >= ENVIRONMENT | {"seed", "seconds", "steps"}
        assert 0 <= row["accuracy"] <= 1
    parameters = {row["arm"]: row["parameters"] for row in rows if "parameters" in row}
    assert set(parameters) == {"lora", "poly", "hyperadapt true"}
    assert max(parameters.values()) < 1.1 * min(parameters.values())
    assert {path.suffix for path in tmp_path.glob("transfer.*")} == {".svg"}
    output = capsys.readouterr().out

    # Everything is there, so only the report is made again; other settings are not mixed with it.
    transfer.main()
    again = capsys.readouterr().out
    assert again.count("done before") == len(transfer.ARMS)
    assert output.endswith(again[again.index("\narm ") :])
    monkeypatch.setitem(transfer.FAST, "steps", 4)
    with pytest.raises(SystemExit, match=r"was made with steps=3, not 4"):
        transfer.main()


def test_transfer_trains_all_arms_on_the_same_batches(tmp_path: Path) -> None:
    try:
        data = load_data(["trec6", "sms_spam"], ["nyt_sent"], rows=70, test_rows=1)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    trainer = make_trainer(add_hyperadapter(data, seed=3), data, 1, 3, str(tmp_path))
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 5
    for batch, other in zip(batches, task_batches(data, seed=3), strict=False):
        assert batch.keys() == other.keys() >= {"input_ids", "attention_mask", "labels", "tasks"}
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_transfer_tells_the_hypernetwork_what_the_arm_says() -> None:
    names = [*transfer.TRAINED_TASKS, *transfer.HELD_OUT_TASKS]
    owner = {text: name for name, texts in DESCRIPTIONS.items() for text in texts}
    others = set()
    for seed in range(30):
        texts = descriptions_for(names, transfer.HELD_OUT_TASKS, seed)
        assert tuple(texts) == KINDS
        assert all(owner[texts["true"][name]] == name for name in transfer.HELD_OUT_TASKS)
        sources = {name: owner[texts["shuffled"][name]] for name in transfer.HELD_OUT_TASKS}
        assert all(source != name for name, source in sources.items())
        assert len(set(sources.values())) == len(sources)
        others |= set(sources.items())
        assert set(texts["random"].values()) <= set(UNRELATED) - set(owner)
        assert set(texts["blank"].values()) == {BLANK}
    assert len(others) > 25


def test_interval_is_students() -> None:
    # 95% quantile of t with 4 degrees of freedom, from any table: 2.776.
    mean, half = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.776 * 0.025**0.5 / 5**0.5, rel=1e-3)
