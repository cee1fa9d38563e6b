"""Runs that are killed at any moment: what looks like a checkpoint is one, and a resumed run equals a whole one."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from safetensors.torch import load_file
from transformers import TrainingArguments

from hyperadapt.trainer import HyperAdapterTrainer
from tests.support.helpers import ROOT, TASKS, adapted_model, example_batch
from tests.support.killed_run import SAVE_STEPS, STEPS

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}


def run(folder: Path, *when: object, processes: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.support.killed_run", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, when)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if when == ("never",):
        assert result.returncode == 0, result.stderr
    elif processes == 1:
        assert result.returncode == -signal.SIGKILL, result.stderr
    else:
        assert "Signal 9 (SIGKILL)" in result.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def assert_same_end(whole: Path, killed: Path) -> None:
    expected, actual = load_file(whole / "final.safetensors"), load_file(killed / "final.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_resumes(folder: Path, kills: list[tuple[object, ...]]) -> None:
    whole, killed = folder / "whole", folder / "killed"
    run(whole, "never")
    assert len(checkpoints(whole)) == STEPS // SAVE_STEPS
    for when in kills:
        run(killed, *when)
        found = checkpoints(killed)
        assert len(found) <= 2
        for checkpoint in found:
            assert {path.name for path in checkpoint.iterdir()} == FILES
            expected = weights(whole / checkpoint.name)
            assert all(torch.equal(value, expected[name]) for name, value in weights(checkpoint).items()), when
    run(killed, "never")
    assert_same_end(whole, killed)
    # What the killed runs left unfinished is gone.
    assert {path.name for path in killed.iterdir()} == {"checkpoint-99", "checkpoint-102", "final.safetensors"}


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_run_that_is_killed_twice(tmp_path: Path) -> None:
    assert_resumes(tmp_path, [("step", 10), ("event", 2, 9)])


@pytest.mark.multi_process
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.8 cannot load the optimiser's state onto 'cpu:0'"
)
def test_two_processes_that_are_killed(tmp_path: Path) -> None:
    run(tmp_path / "whole", "never", processes=2)
    # Its last checkpoint, of step 21, lies within an epoch of two steps.
    run(tmp_path / "killed", "step", 22, processes=2)
    assert {path.name for path in checkpoints(tmp_path / "killed")} == {"checkpoint-18", "checkpoint-21"}
    run(tmp_path / "killed", "never", processes=2)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_run_that_is_killed_ten_times(tmp_path: Path) -> None:
    generator = random.Random(0)
    kills: list[tuple[object, ...]] = [("step", generator.randint(1, 6))]
    # Each comes at the third save after the last, so that the run gets on between them and has checkpoints to delete.
    for kind in ("event", "time", "event", "event", "time", "event", "time", "event", "event"):
        moment = generator.randint(1, 32) if kind == "event" else round(generator.uniform(0, 0.05), 4)
        kills.append((kind, 3, moment))
    assert_resumes(tmp_path, kills)


def train(folder: Path, resume: bool = False, **changes: Any) -> HyperAdapterTrainer:
    batch = example_batch("bert", rows=8)
    rows = {task: Dataset.from_dict({key: value.tolist() for key, value in batch.items()}) for task in TASKS}
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = HyperAdapterTrainer(
        # Without normalisation, so that a rate can be far too high.
        adapted_model("bert", normalization="none"),
        TrainingArguments(**options | changes),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_best_checkpoint_is_kept_under_its_name(tmp_path: Path) -> None:
    trainer = train(
        tmp_path,
        save_total_limit=2,
        learning_rate=10.0,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="mean_loss",
        greater_is_better=False,
    )
    means = [entry["eval_mean_loss"] for entry in trainer.state.log_history if "eval_mean_loss" in entry]
    best = means.index(min(means)) + 1
    assert best < 4, "the learning rate is meant to be far too high"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{best}", "checkpoint-4"}
    state = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{tmp_path}/checkpoint-{best}"' in state


def test_the_best_checkpoint_is_kept_by_a_run_that_was_moved(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_total_limit": 2,
        "learning_rate": 10.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "mean_loss",
        "greater_is_better": False,
    }
    best = Path(str(train(tmp_path / "old", max_steps=3, **options).state.best_model_checkpoint)).name
    assert best != "checkpoint-3", "the learning rate is meant to be far too high"
    (tmp_path / "old").rename(tmp_path / "new")
    trainer = train(tmp_path / "new", max_steps=4, resume=True, **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / best)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {best, "checkpoint-4"}


def test_checkpoints_that_were_made_at_once_are_old_by_their_steps(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1, save_strategy="no", save_total_limit=3)
    paths = [tmp_path / f"checkpoint-{step}" for step in (100, 20, 30, 110)]
    for path in paths:
        path.mkdir()
        os.utime(path, (1, 1))
    assert trainer._superfluous(tmp_path, paths[3]) == paths[1:2]
    # Else by their times: a run that began anew has its own.
    os.utime(paths[1], (5, 5))
    assert trainer._superfluous(tmp_path, paths[3]) == paths[2:3]


def test_an_earlier_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "stale").touch()
    (tmp_path / "checkpoint-x").mkdir()
    train(tmp_path, max_steps=2, save_steps=2, save_total_limit=1)
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-x"}


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HyperAdapterTrainer, folder: str) -> None:
        raise OSError(f"no space left on device: {folder}")

    monkeypatch.setattr(HyperAdapterTrainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="no space left"):
        train(tmp_path)
    assert checkpoints(tmp_path) == []
    monkeypatch.undo()
    train(tmp_path)
    assert len(checkpoints(tmp_path)) == 4
