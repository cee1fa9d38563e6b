"""What a loop with Accelerate needs beside its steps: a state to resume from, and accuracies over all processes."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from examples.support.data import TextData
from examples.support.training import training_parser
from hyperadapt.trainer import TaskCollator, TaskSampler, concatenate_tasks


def parse_options(description: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of the example, and those that trackers can log."""
    parser = training_parser(description, steps=400, rows=2000, output="runs/accelerate")
    parser.set_defaults(batch_size=16)
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per optimiser step")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: as launched")
    parser.add_argument("--log-with", help="a tracker, such as tensorboard or wandb")
    parser.add_argument("--save-every", type=int, default=100, help="optimiser steps between two saved states")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    options = parser.parse_args()
    return options, {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)}


class Progress:
    """How far a run has come, saved with its state: optimiser steps, finished epochs, batches of the current one."""

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.batch = 0

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the counts."""
        vars(self).update(state_dict)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Save everything that a resumed run needs, so that `folder` appears when it is complete."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    accelerator.wait_for_everyone()


def remaining_batches(
    accelerator: Accelerator, loader: Any, sampler: TaskSampler, progress: Progress, steps: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after the other, from where a run stopped, until it has made its steps."""
    while progress.step < steps:
        part = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        part.set_epoch(progress.epoch)
        # Accelerate does not reach the sampler where batches are both skipped and dealt out to processes.
        sampler.set_epoch(progress.epoch)
        for batch in part:
            progress.batch += 1
            yield batch
            if progress.step == steps:
                return
        progress.epoch, progress.batch = progress.epoch + 1, 0


def log_loss(accelerator: Accelerator, progress: Progress, loss: Tensor, rate: float) -> None:
    """Print the mean of all processes' losses, and give it to the trackers."""
    mean = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.log({"loss": mean, "learning_rate": rate}, progress.step)
    accelerator.print(f"step {progress.step} loss {mean:.3f}")


@torch.no_grad()
def test_accuracies(accelerator: Accelerator, model: Any, data: TextData, step: int) -> dict[str, float]:
    """Accuracy of each task over the test rows of all processes, printed and logged."""
    model.eval()
    scores = {}
    collator = TaskCollator(data.collator)
    for name, rows in data["test"].items():
        with_tasks = concatenate_tasks({name: rows}, list(data.descriptions))
        right = []
        for batch in accelerator.prepare(DataLoader(with_tasks, 64, collate_fn=collator)):
            predicted = data.own_class(model(**batch).logits, batch["labels"])
            right.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
        scores[name] = torch.cat(right).float().mean().item()
        accelerator.print(f"{name:<16}{scores[name]:>8.3f}")
    accelerator.log({f"accuracy/{name}": value for name, value in scores.items()}, step)
    accelerator.print(f"mean accuracy {sum(scores.values()) / len(scores):.3f} over {len(scores)} tasks")
    return scores
