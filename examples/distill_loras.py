"""Train one LoRA per text task, then fit all of them with one hyperadapter: `python -m examples.distill_loras`.

The LoRAs are independent, each with its own seed, and share nothing but the base model. The fit sees their folders
alone, no data. What counts is how much of their gain in accuracy the hyperadapter keeps, and how small its file is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from benchmarks.rows import save_rows
from examples.support.cards import save_card
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import LabelMatcher, accuracy, load_matcher
from examples.support.text_tasks import load_task
from hyperadapt import HyperAdapterConfig, distill
from hyperadapt.config import HEADS

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent"),
    *("movie_sent", "reuters_r8", "stereoset_rel", "trump_clinton"),
)
MAX_LENGTH = 32
WEIGHTS = "adapter_model.safetensors"
USAGE = """\
import hyperadapt  # registers the method with PEFT
from examples.support.encoder import load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import load_task
from peft import PeftModel

tokenizer = load_tokenizer()
task = load_task("sms_spam")
model = PeftModel.from_pretrained(load_matcher([task], tokenizer), "{folder}").eval()
scores = model(**tokenizer("You have won a prize", return_tensors="pt"), tasks="sms_spam").logits
print(task.labels[scores.argmax()])
"""


def train_lora(
    base: LabelMatcher, rows: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, *, steps: int, seed: int
) -> None:
    """Train a LoRA of rank 16 on all linear layers and save it; the base model is left as it was.

    Args:
        base: The base model.
        rows: Encoded training rows.
        tokenizer: The tokenizer.
        folder: Where to save it.
        steps: Number of optimiser steps, of 32 rows each.
        seed: Of its initial weights and of the rows drawn.
    """
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, steps, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    collate = DataCollatorWithPadding(tokenizer)
    for _ in range(steps):
        indices = torch.randint(len(rows), (32,)).tolist()
        model(**collate([rows[index] for index in indices])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(str(folder))
    model.unload()


def lora_accuracy(base: LabelMatcher, folder: Path, rows: list[dict[str, Tensor]]) -> float:
    """Accuracy with a saved LoRA; the base model is left as it was.

    Args:
        base: The base model.
        folder: The LoRA.
        rows: Batches of test rows.

    Returns:
        The accuracy.
    """
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    result = accuracy(model, rows)
    model.unload()
    return result


def main() -> None:
    """Train the LoRAs, fit them, test what was saved and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=600, help="of the fit")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of the fit")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--head", choices=HEADS, default="pair")
    parser.add_argument("--hypernetwork-dim", type=int, default=44)
    parser.add_argument("--rows", type=int, default=4000, help="training rows per task at most; an eighth for the test")
    parser.add_argument("--reuse-loras", action="store_true", help="keep the LoRAs of an earlier run in --output")
    parser.add_argument("--fast", action="store_true", help="three tasks and a few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("runs/distill_loras"))
    options = parser.parse_args()
    names: tuple[str, ...] = TASKS
    if options.fast:
        names = TASKS[:3]
        options.lora_steps, options.steps, options.rows = 3, 10, 96
    started = time.monotonic()

    tasks = [load_task(name) for name in names]
    tokenizer = load_tokenizer()
    data = {
        split: [
            rows.remove_columns("tasks")
            for rows in encode(tasks, split, tokenizer, max_rows=size, max_length=MAX_LENGTH)
        ]
        for split, size in {"train": options.rows, "test": options.rows // 8}.items()
    }
    test = {name: list(batches(rows, tokenizer)) for name, rows in zip(names, data["test"], strict=True)}
    # Half precision takes half of the time on a CPU that has it; the LoRAs' weights are float32 all the same.
    base = load_matcher(tasks, tokenizer, torch.bfloat16)
    folders = {name: options.output / "loras" / name for name in names}
    before: dict[str, float] = {}
    with_lora: dict[str, float] = {}
    for seed, (name, rows) in enumerate(zip(names, data["train"], strict=True)):
        before[name] = accuracy(base, test[name])
        if not (options.reuse_loras and (folders[name] / WEIGHTS).exists()):
            train_lora(base, rows, tokenizer, folders[name], steps=options.lora_steps, seed=seed)
        with_lora[name] = lora_accuracy(base, folders[name], test[name])
        print(f"{name}: {before[name]:.3f} -> {with_lora[name]:.3f} ({time.monotonic() - started:.0f} s)", flush=True)

    torch.manual_seed(0)
    config = HyperAdapterConfig(
        r=options.r,
        lora_alpha=options.r,
        target_modules="all-linear",
        tasks=list(names),
        head=options.head,
        hypernetwork_dim=options.hypernetwork_dim,
    )
    model = get_peft_model(base, config)
    fit_started = time.monotonic()
    fit = distill(model, folders, steps=options.steps, learning_rate=options.learning_rate)
    seconds = time.monotonic() - fit_started
    model.save_pretrained(str(options.output / "hyperadapter"))
    loaded = PeftModel.from_pretrained(model.unload(), str(options.output / "hyperadapter")).eval()
    distilled = {name: accuracy(loaded, test[name], tasks=name) for name in names}

    save_card(
        loaded,
        options.output / "hyperadapter",
        module="examples.distill_loras",
        title="Eight LoRAs of rank 16 in one hyperadapter",
        usage=USAGE.format(folder=(options.output / "hyperadapter").as_posix()),
        results={
            name: {"accuracy": distilled[name], "accuracy with its LoRA": with_lora[name], "base model": before[name]}
            for name in names
        },
        training={
            "steps of the fit": options.steps,
            "learning_rate": options.learning_rate,
            "steps of each LoRA": options.lora_steps,
            "relative error of the updates": {name: round(fit.error[name], 3) for name in names},
        },
    )
    print(f"\n{'task':<16}{'base':>8}{'LoRA':>8}{'distilled':>11}{'relative error':>16}")
    for name in names:
        row = f"{before[name]:>8.3f}{with_lora[name]:>8.3f}{distilled[name]:>11.3f}{fit.error[name]:>16.3f}"
        print(f"{name:<16}{row}")
    gain, kept = (sum(after[name] - before[name] for name in names) for after in (with_lora, distilled))
    size = (options.output / "hyperadapter" / WEIGHTS).stat().st_size
    lora_size = sum((folder / WEIGHTS).stat().st_size for folder in folders.values())
    print(f"\nfit: {options.steps} steps in {seconds:.0f} s; seconds in all: {time.monotonic() - started:.0f}")
    print(f"gain in accuracy kept: {kept / gain:.1%} of {gain / len(names):.3f} per task")
    print(f"size: {size:,} bytes instead of {lora_size:,}, {size / lora_size:.1%}")
    shared = {key: value for key, value in vars(options).items() if key not in ("output", "reuse_loras")}
    shared |= {"gain_kept": kept / gain, "bytes": size, "lora_bytes": lora_size, "fit_seconds": seconds}
    save_rows(
        options.output / "rows.jsonl",
        [
            {
                **shared,
                "task": name,
                "base": before[name],
                "lora": with_lora[name],
                "distilled": distilled[name],
                "relative_error": fit.error[name],
            }
            for name in names
        ],
    )


if __name__ == "__main__":
    main()
