"""Many tasks in a training loop of one's own, with Accelerate: `accelerate launch -m examples.train_accelerate`.

Shows mixed precision, gradient accumulation, clipping, trackers, and a run that can be stopped and resumed at any
step. Launch files for several devices are in `examples/accelerate`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from examples.support.cards import classifier_usage, save_card
from examples.support.encoder import encode, label_offsets, load_base, load_tokenizer, predict_own_class
from examples.support.text_tasks import load_task
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskCollator, TaskSampler, concatenate_tasks

TASKS = ("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent", "stereoset_rel", "trump_clinton", "bbc")
MAX_LENGTH = 40


class Progress:
    """How far a run has come; saved with its state."""

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.batch = 0

    def state_dict(self) -> dict[str, int]:
        """The counts.

        Returns:
            Optimiser steps, finished epochs, and batches seen in the current one.
        """
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the counts.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        vars(self).update(state_dict)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Save everything that a resumed run needs, so that `folder` appears when it is complete.

    Args:
        accelerator: The accelerator.
        folder: Folder to make.
    """
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


@torch.no_grad()
def accuracies(
    accelerator: Accelerator, model: Any, data: dict[str, DataLoader], offsets: list[int]
) -> dict[str, float]:
    """Accuracy on each task.

    Args:
        accelerator: The accelerator.
        model: The prepared model.
        data: A prepared data loader per task.
        offsets: See ``label_offsets``.

    Returns:
        Task name -> accuracy.
    """
    model.eval()
    results = {}
    for name, batches in data.items():
        right = []
        for batch in batches:
            predicted = predict_own_class(model(**batch).logits, batch["labels"], offsets)
            right.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
        results[name] = torch.cat(right).float().mean().item()
    model.train()
    return results


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per device and backward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per optimiser step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: as launched")
    parser.add_argument("--log-with", help="a tracker, such as tensorboard or wandb")
    parser.add_argument("--rows", type=int, default=2000, help="training rows per task at most")
    parser.add_argument("--save-every", type=int, default=100, help="optimiser steps between two saved states")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        mixed_precision=options.mixed_precision,
        log_with=options.log_with,
        project_dir=options.output,
        step_scheduler_with_optimizer=False,
    )
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("hyperadapt", settings)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}")
    set_seed(0)

    tasks = [load_task(name) for name in TASKS]
    offsets = label_offsets(tasks)
    tokenizer = load_tokenizer()

    def encoded(split: str, max_rows: int) -> dict[str, Dataset]:
        rows = encode(tasks, split, tokenizer, max_rows=max_rows, max_length=MAX_LENGTH)
        return {task.name: one.remove_columns("tasks") for task, one in zip(tasks, rows, strict=True)}

    config = HyperAdapterConfig(
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        tasks={task.name: task.description for task in tasks},
    )
    model = get_peft_model(load_base(offsets[-1], seed=0), config).train()
    rows = concatenate_tasks(encoded("train", options.rows), config.task_names)
    collator = TaskCollator(DataCollatorWithPadding(tokenizer))
    sampler = TaskSampler(rows["tasks"], options.batch_size, temperature=2.0, seed=0)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=options.learning_rate
    )
    # Its own generator: a loader draws a seed whenever it starts, which would move the state that dropout reads.
    loader = DataLoader(rows, options.batch_size, sampler=sampler, collate_fn=collator, generator=torch.Generator())
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader)
    schedule = get_linear_schedule_with_warmup(optimizer, options.steps // 16, options.steps)
    progress = Progress()
    accelerator.register_for_checkpointing(schedule, progress)
    tests = {
        name: accelerator.prepare(
            DataLoader(concatenate_tasks({name: one}, config.task_names), 64, collate_fn=collator)
        )
        for name, one in encoded("test", options.rows // 5).items()
    }

    saved = options.output / "state"
    if options.resume:
        accelerator.load_state(str(saved))
        accelerator.print(f"resumed at step {progress.step}")
    while progress.step < options.steps:
        part = accelerator.skip_first_batches(batches, progress.batch) if progress.batch else batches
        part.set_epoch(progress.epoch)
        # Accelerate does not reach the sampler where batches are both skipped and dealt out to processes.
        sampler.set_epoch(progress.epoch)
        for batch in part:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            schedule.step()
            progress.step += 1
            if progress.step % 20 == 0:
                mean = accelerator.reduce(loss.detach(), "mean").item()
                accelerator.log({"loss": mean, "learning_rate": schedule.get_last_lr()[0]}, progress.step)
                accelerator.print(f"step {progress.step}/{options.steps} loss {mean:.3f}")
            if progress.step % options.save_every == 0:
                save_state(accelerator, saved)
            if progress.step == options.steps:
                break
        progress.epoch, progress.batch = progress.epoch + 1, 0

    scores = accuracies(accelerator, model, tests, offsets)
    accelerator.log({f"accuracy/{name}": value for name, value in scores.items()}, progress.step)
    for name, value in scores.items():
        accelerator.print(f"{name:<16}{value:>8.3f}")
    accelerator.print(f"mean accuracy {sum(scores.values()) / len(scores):.3f} over {len(scores)} tasks")
    folder = options.output / "hyperadapter"
    accelerator.unwrap_model(model).save_pretrained(
        folder,
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        # Of the file, since the model may be spread over processes.
        save_card(
            PeftModel.from_pretrained(load_base(offsets[-1], seed=0), folder).eval(),
            folder,
            module="examples.train_accelerate",
            title="Eight text tasks in one hyperadapter, in a loop with Accelerate",
            usage=classifier_usage(offsets[-1], folder),
            results={name: {"accuracy": value} for name, value in scores.items()},
            training={
                "steps": options.steps,
                "batch_size": options.batch_size * options.accumulate * accelerator.num_processes,
                "learning_rate": options.learning_rate,
                "rows per task at most": options.rows,
                "tokens per row": MAX_LENGTH,
                "seed": 0,
                "processes": accelerator.num_processes,
            },
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
