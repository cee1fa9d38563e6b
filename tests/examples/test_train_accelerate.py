"""A loop of one's own: a resumed run equals a whole one, in one process and in two; launch files say what they name."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from examples import train_accelerate
from examples.support.text_tasks import encoder_path
from tests.support.card_schema import check_example_card
from tests.support.helpers import ROOT

LAUNCH_FILES = ROOT / "examples" / "accelerate"
# Five batches an epoch, or ten in one process, and an optimiser step every two: the state is saved within an epoch.
OPTIONS = ("--rows", "5", "--batch-size", "4", "--steps", "6", "--save-every", "4")


@pytest.fixture(autouse=True)
def needs_data() -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def run_here(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_accelerate", *arguments])
    # Accelerate keeps one state for each process, also from other tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train_accelerate.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run_twofold(arguments: Sequence[str]) -> str:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "ddp.yaml")]
    launcher += ["--mixed_precision", "no", "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "examples.train_accelerate", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.multi_process
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_a_whole_one(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(folder: str, *options: str) -> str:
        arguments = [*OPTIONS, "--output", str(tmp_path / folder), *options]
        if processes == 2:
            return run_twofold(arguments)
        run_here(arguments, monkeypatch)
        return capfd.readouterr().out

    output = run("whole")
    assert f"{processes} processes, {'MULTI_CPU' if processes == 2 else 'NO'}\n" in output
    assert re.search(r"mean accuracy [01]\.\d{3} over 8 tasks", output)
    shutil.copytree(tmp_path / "whole" / "state", tmp_path / "resumed" / "state")
    assert "resumed at step 4" in run("resumed", "--resume")
    whole, resumed = (
        load_file(tmp_path / name / "hyperadapter" / "adapter_model.safetensors") for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.values: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.values.setdefault(step, {}).update(values)


def test_trackers_and_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()

    def accelerator(**options: Any) -> Accelerator:
        assert options["log_with"] == "recorder"
        return Accelerator(**options | {"log_with": recorder})

    monkeypatch.setattr(train_accelerate, "Accelerator", accelerator)
    options = ["--rows", "5", "--batch-size", "2", "--steps", "20", "--accumulate", "1", "--mixed-precision", "bf16"]
    monkeypatch.chdir(tmp_path)
    run_here([*options, "--log-with", "recorder"], monkeypatch)
    assert (recorder.settings["batch_size"], recorder.settings["mixed_precision"]) == (2, "bf16")
    assert set(recorder.values) == {20}
    accuracies = {f"accuracy/{name}" for name in train_accelerate.TASKS}
    assert set(recorder.values[20]) == {"loss", "learning_rate", *accuracies}
    assert recorder.values[20]["learning_rate"] == 0
    folder = Path("runs/accelerate/hyperadapter")
    check_example_card(folder, "train_accelerate")
    saved = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "kind", "setting"),
    [
        ("ddp", "MULTI_GPU", None),
        ("fsdp2", "FSDP", ("fsdp_config", "fsdp_version", 2)),
        ("zero2", "DEEPSPEED", ("deepspeed_config", "zero_stage", 2)),
        ("zero3", "DEEPSPEED", ("deepspeed_config", "zero_stage", 3)),
    ],
)
def test_launch_files(name: str, kind: str, setting: tuple[str, str, int] | None) -> None:
    config = load_config_from_file(str(LAUNCH_FILES / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == 2
    if setting is not None:
        section, key, value = setting
        assert getattr(config, section)[key] == value
