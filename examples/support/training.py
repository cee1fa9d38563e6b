"""Options and settings of training that the examples share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def training_parser(description: str | None, *, steps: int, rows: int, output: str) -> argparse.ArgumentParser:
    """A parser of the options that all of them have, with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=rows, help="training rows per task at most")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def training_arguments(options: argparse.Namespace, *, evaluations: int, **changes: Any) -> TrainingArguments:
    """A short warm-up, and so many evaluations at even distances."""
    every = max(1, options.steps // evaluations)
    settings = {
        "output_dir": str(options.output / "trainer"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": options.learning_rate,
        "warmup_steps": options.steps // 16,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": max(1, every // 2),
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)
