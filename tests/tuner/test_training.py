"""Training through Trainer and in two processes: resumed and distributed runs equal plain ones."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from tests.support.helpers import MIXED, TASKS, adapted_model, adapter_parameters, example_batch, gradients
from tests.support.tolerances import FLOAT64_MODEL

BATCH = example_batch("bert")
IDS = torch.tensor([TASKS.index(task) for task in MIXED])


def train(folder: Path, *, steps: int, resume: bool = False) -> PeftModel:
    columns = {**BATCH, "tasks": IDS}
    rows = [{name: value[index] for name, value in columns.items()} for index in range(len(IDS))] * 6
    model = adapted_model("bert", lora_dropout=0.1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows).with_format("torch"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = adapter_parameters(train(tmp_path / "whole", steps=6))
    half = adapter_parameters(train(tmp_path / "half", steps=3))
    resumed = adapter_parameters(train(tmp_path / "half", steps=6, resume=True))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert any(not torch.equal(half[name], value) for name, value in whole.items())


def loss_of(model: Any, rows: slice) -> Tensor:
    batch = {name: value[rows] for name, value in BATCH.items()}
    loss: Tensor = model(**batch, tasks=IDS[rows]).loss
    return loss


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted_model("bert").double())
    # The ranks see different rows, and with them different tasks.
    loss_of(model, slice(2 * rank, 2 * rank + 2)).backward()
    torch.save((dist.get_world_size(), gradients(model.module)), Path(folder, f"{rank}.pt"))
    # Not an orderly end: it can wait forever for a thread of gloo's that itself waits for the interpreter's lock.
    os._exit(0)


@pytest.mark.multi_process
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    model = adapted_model("bert").double()
    loss_of(model, slice(0, 4)).backward()
    expected = gradients(model)
    for rank in range(2):
        world_size, actual = torch.load(tmp_path / f"{rank}.pt")
        assert world_size == 2
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(actual[name], value, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL * float(value.abs().max()))
