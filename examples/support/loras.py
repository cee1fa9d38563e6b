"""Independent LoRAs, one per text task, and what becomes of them in one hyperadapter."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from benchmarks.common.rows import save_rows
from examples.support.cards import MATCHER, save_card
from examples.support.data import TextData
from examples.support.encoder import batches
from examples.support.matching import LabelMatcher, accuracy

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Scores:
    """Test accuracies of a task: of the base model, with its own LoRA, and with the hyperadapter."""

    base: float
    lora: float
    distilled: float = 0.0
    relative_error: float = 0.0


def train_lora(base: LabelMatcher, rows: Dataset, data: TextData, folder: Path, *, steps: int, seed: int) -> None:
    """Train a LoRA of rank 16 on all linear layers and save it; the base model is left as it was."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, steps, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    for _ in range(steps):
        indices = torch.randint(len(rows), (32,)).tolist()
        model(**data.collator([rows[index] for index in indices])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(str(folder))
    model.unload()


def score_lora(base: LabelMatcher, folder: Path, name: str, data: TextData) -> Scores:
    """Accuracies without and with a task's LoRA, printed; the base model is left as it was."""
    test = _test_batches(name, data)
    before = accuracy(base, test)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    scores = Scores(before, accuracy(model, test))
    model.unload()
    print(f"{name}: {scores.base:.3f} -> {scores.lora:.3f} ({time.monotonic() - data.started:.0f} s)", flush=True)
    return scores


def score_distilled(model: PeftModel, errors: Mapping[str, float], scores: dict[str, Scores], data: TextData) -> None:
    """Add the accuracies with the hyperadapter, and the relative errors of its updates."""
    for name, score in scores.items():
        score.distilled = accuracy(model, _test_batches(name, data), tasks=name)
        score.relative_error = errors[name]


def _test_batches(name: str, data: TextData) -> list[dict[str, Tensor]]:
    return list(batches(data["test"][name], data.tokenizer))


def save_distilled_card(
    model: PeftModel, folder: Path, scores: Mapping[str, Scores], options: argparse.Namespace
) -> None:
    """Write the card of the hyperadapter."""
    save_card(
        model,
        folder,
        "distill_loras",
        usage=MATCHER.format(folder=folder.as_posix()),
        results={
            name: {"accuracy": one.distilled, "accuracy with its LoRA": one.lora, "base model": one.base}
            for name, one in scores.items()
        },
        training={
            "steps of the fit": options.steps,
            "learning_rate": options.learning_rate,
            "steps of each LoRA": options.lora_steps,
            "relative error of the updates": {name: round(one.relative_error, 3) for name, one in scores.items()},
        },
    )


def report(scores: Mapping[str, Scores], options: argparse.Namespace, data: TextData, fit_seconds: float) -> None:
    """Print the table, the gain that is kept and the sizes, and save a row for each task."""
    print(f"\n{'task':<16}{'base':>8}{'LoRA':>8}{'distilled':>11}{'relative error':>16}")
    for name, one in scores.items():
        print(f"{name:<16}{one.base:>8.3f}{one.lora:>8.3f}{one.distilled:>11.3f}{one.relative_error:>16.3f}")
    gain = sum(one.lora - one.base for one in scores.values())
    kept = sum(one.distilled - one.base for one in scores.values()) / gain
    size = (options.output / "hyperadapter" / WEIGHTS).stat().st_size
    lora_size = sum((options.output / "loras" / name / WEIGHTS).stat().st_size for name in scores)
    seconds = time.monotonic() - data.started
    print(f"\nfit: {options.steps} steps in {fit_seconds:.0f} s; seconds in all: {seconds:.0f}")
    print(f"gain in accuracy kept: {kept:.1%} of {gain / len(scores):.3f} per task")
    print(f"size: {size:,} bytes instead of {lora_size:,}, {size / lora_size:.1%}")
    shared = {key: value for key, value in vars(options).items() if key not in ("output", "reuse_loras", "tasks")}
    shared |= {"gain_kept": kept, "bytes": size, "lora_bytes": lora_size, "fit_seconds": fit_seconds}
    save_rows(options.output / "rows.jsonl", [{**shared, "task": name, **asdict(one)} for name, one in scores.items()])
