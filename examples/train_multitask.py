"""Fine-tune MiniLM on ten text tasks at once with HyperAdapterTrainer: `python -m examples.train_multitask`.

The model that is best on the mean validation accuracy over tasks is kept, and tested task by task.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import DataCollatorWithPadding, EvalPrediction, TrainingArguments

from examples.support.cards import classifier_usage, save_card
from examples.support.encoder import encode, label_offsets, load_base, load_tokenizer, predict_own_class
from examples.support.text_tasks import TextTask, load_task
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import HyperAdapterTrainer

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent"),
    *("reuters_r8", "stereoset_rel", "trump_clinton", "bbc", "newsgroups20"),
)
MAX_LENGTH = 40


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right predictions.

    Args:
        prediction: Class ids and labels.

    Returns:
        The metric.
    """
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def majority(task: TextTask, rows: int) -> float:
    """Test accuracy of always answering the training rows' most frequent class.

    Args:
        task: The task.
        rows: Number of test rows.

    Returns:
        The accuracy.
    """
    [(label, _)] = Counter(task.train["label"]).most_common(1)
    labels = task.test["label"][:rows]
    return sum(other == label for other in labels) / len(labels)


def main() -> None:
    """Train, choose, test and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=2.0, help="1 samples tasks by size, 100 nearly alike")
    parser.add_argument("--rows", type=int, default=4000, help="training rows per task at most")
    parser.add_argument("--output", type=Path, default=Path("runs/multitask"))
    options = parser.parse_args()
    started = time.monotonic()

    tasks = [load_task(name) for name in TASKS]
    tokenizer = load_tokenizer()
    offsets = label_offsets(tasks)
    sizes = {"train": options.rows, "validation": max(20, options.rows // 40), "test": max(20, options.rows // 10)}
    data = {
        split: {
            task.name: rows.remove_columns("tasks")
            for task, rows in zip(
                tasks, encode(tasks, split, tokenizer, max_rows=size, max_length=MAX_LENGTH), strict=True
            )
        }
        for split, size in sizes.items()
    }
    config = HyperAdapterConfig(
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        tasks={task.name: task.description for task in tasks},
    )
    model = get_peft_model(load_base(offsets[-1], seed=0), config)
    every = max(1, options.steps // 5)
    trainer = HyperAdapterTrainer(
        model,
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 16,
            eval_strategy="steps",
            eval_steps=every,
            save_steps=every,
            save_total_limit=2,
            logging_steps=max(1, every // 2),
            load_best_model_at_end=True,
            metric_for_best_model="mean_accuracy",
            greater_is_better=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            label_names=["labels"],
            report_to="none",
            seed=0,
        ),
        DataCollatorWithPadding(tokenizer),
        data["train"],
        data["validation"],
        temperature=options.temperature,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: predict_own_class(logits, labels, offsets),
    )
    trainer.train()
    metrics = trainer.evaluate(data["test"], metric_key_prefix="test")

    trainable, total = model.get_nb_trainable_parameters()
    folder = options.output / "hyperadapter"
    model.eval().save_pretrained(folder)
    save_card(
        model,
        folder,
        module="examples.train_multitask",
        title="Ten text tasks in one hyperadapter",
        usage=classifier_usage(offsets[-1], folder),
        results={
            task.name: {name: metrics[f"test_{task.name}_{name}"] for name in ("accuracy", "loss")} for task in tasks
        },
        training={
            "steps": options.steps,
            "best checkpoint": Path(trainer.state.best_model_checkpoint).name,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "temperature of sampling": options.temperature,
            "rows per task at most": options.rows,
            "tokens per row": MAX_LENGTH,
            "seed": 0,
            "trainable parameters": trainable,
        },
        log_history=trainer.state.log_history,
    )
    print(f"\n{'task':<16}{'classes':>8}{'rows':>8}{'majority':>10}{'accuracy':>10}{'loss':>8}")
    for task in tasks:
        baseline = majority(task, sizes["test"])
        scores = [metrics[f"test_{task.name}_{name}"] for name in ("accuracy", "loss")]
        rows = len(data["train"][task.name])
        print(f"{task.name:<16}{len(task.labels):>8}{rows:>8}{baseline:>10.3f}{scores[0]:>10.3f}{scores[1]:>8.3f}")
    print(f"\nbest checkpoint: {Path(trainer.state.best_model_checkpoint).name} of {options.steps} steps")
    print(f"trainable parameters: {trainable:,} of {total:,}; seconds: {time.monotonic() - started:.0f}")
    print(f"mean test accuracy: {metrics['test_mean_accuracy']:.3f} over {len(TASKS)} tasks")


if __name__ == "__main__":
    main()
