"""One hypernetwork, seven real text tasks: train, evaluate, save, reload and export.

Run as `python -m examples.quickstart`. Every task is compared with a linear probe on the frozen encoder, trained
and tested on the same rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from examples.support.cards import classifier_usage, save_card
from examples.support.encoder import (
    MeanPoolingClassifier,
    batches,
    encode,
    label_offsets,
    load_base,
    load_tokenizer,
    predict_logits,
    predict_own_class,
)
from examples.support.text_tasks import TextTask, load_task
from hyperadapt import HyperAdapterConfig, export_lora
from hyperadapt.normalization import NORMALIZATIONS

TASKS = ("trec6", "sms_spam", "movie_sent", "product_sent", "stereoset_rel", "trump_clinton", "bbc")
EXPORTED = "trec6"
MAX_LENGTH = 40
BATCH_SIZE = 32
# Logits are of size 10, and float32 rounds A and B·S in another order than A, S and B.
EXPORT_TOLERANCE = 1e-4
PROBE_STRENGTHS = (0.01, 0.1, 1.0)


class PrintAccuracies(TrainerCallback):
    """Prints the validation accuracy of every task during training."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Print one line.

        Args:
            args: Training arguments.
            state: State of the trainer.
            control: Flow control of the trainer.
            metrics: Metrics of the evaluation.
            **kwargs: Everything else a callback gets.
        """
        accuracies = " ".join(f"{name} {metrics[f'eval_{name}']:.2f}" for name in (*TASKS, "mean"))
        print(f"\nstep {state.global_step}/{state.max_steps} validation: {accuracies}", flush=True)


def encode_splits(tasks: Sequence[TextTask], tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, list[Dataset]]:
    """Encode every split of every task.

    Args:
        tasks: The tasks.
        tokenizer: The tokenizer.
        rows: Training rows per task; a fifth as many for the test, a twenty-fifth for validation.

    Returns:
        A data set per task, by split.
    """
    sizes = {"train": rows, "validation": rows // 25, "test": rows // 5}
    return {
        split: encode(tasks, split, tokenizer, max_rows=size, max_length=MAX_LENGTH) for split, size in sizes.items()
    }


def probe_accuracies(
    model: MeanPoolingClassifier, splits: dict[str, list[Dataset]], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """Test accuracy of a logistic regression on the frozen encoder's embeddings, per task.

    Args:
        model: The base model.
        splits: Encoded data sets per task, by split.
        tokenizer: The tokenizer.

    Returns:
        One accuracy per task; the regularisation is the one that is best on the validation rows.
    """
    accuracies = []
    for index in range(len(TASKS)):
        embedded = {split: embed(model, parts[index], tokenizer) for split, parts in splits.items()}
        probes = [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(*embedded["train"])
            for strength in PROBE_STRENGTHS
        ]
        best = max(probes, key=lambda probe: probe.score(*embedded["validation"]))
        accuracies.append(float(best.score(*embedded["test"])))
    return accuracies


@torch.no_grad()
def embed(
    model: MeanPoolingClassifier, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of a data set.

    Args:
        model: The base model.
        rows: An encoded data set.
        tokenizer: The tokenizer.

    Returns:
        Embeddings ``(rows, hidden_size)`` and labels ``(rows,)``.
    """
    features = [
        model.embed(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        for batch in batches(rows, tokenizer)
    ]
    return torch.cat(features).numpy(), np.asarray(rows["labels"])


def make_metrics(offsets: Sequence[int]) -> tuple[Any, Any]:
    """Per-task accuracy for Trainer, where each row competes only among its own task's classes.

    Args:
        offsets: See ``label_offsets``.

    Returns:
        ``preprocess_logits_for_metrics`` and ``compute_metrics``.
    """
    task_of_class = torch.repeat_interleave(torch.arange(len(TASKS)), torch.tensor(offsets).diff())

    def predict(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return predict_own_class(logits, labels, offsets)

    def accuracies(prediction: EvalPrediction) -> dict[str, float]:
        right = prediction.predictions == prediction.label_ids
        tasks = task_of_class.numpy()[prediction.label_ids]
        scores = {name: float(right[tasks == index].mean()) for index, name in enumerate(TASKS)}
        return scores | {"mean": float(np.mean(list(scores.values())))}

    return predict, accuracies


def train(
    tasks: Sequence[TextTask],
    splits: dict[str, list[Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> Trainer:
    """Fine-tune one hyperadapter on all tasks at once.

    Args:
        tasks: The tasks.
        splits: Encoded data sets per task, by split.
        tokenizer: The tokenizer.
        options: Command line options.

    Returns:
        The trainer, with the trained model.
    """
    offsets = label_offsets(tasks)
    config = HyperAdapterConfig(
        r=8,
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        tasks={task.name: task.description for task in tasks},
        normalization=options.normalization,
    )
    model = get_peft_model(load_base(offsets[-1], seed=0), config)
    model.print_trainable_parameters()
    predict, accuracies = make_metrics(offsets)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 16,
            lr_scheduler_type="linear",
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 4),
            logging_steps=max(1, options.steps // 8),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            label_names=["labels"],
            seed=0,
        ),
        train_dataset=concatenate_datasets(splits["train"]),
        eval_dataset=concatenate_datasets(splits["validation"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracies,
        preprocess_logits_for_metrics=predict,
        callbacks=[PrintAccuracies()],
    )
    trainer.train()
    return trainer


def predict_in_fresh_process(folder: Path, rows: int, *arguments: str) -> torch.Tensor:
    """Logits of a saved adapter on the test rows, computed by another process.

    Args:
        folder: The adapter folder.
        rows: Test rows per task.
        *arguments: Further arguments of ``examples.support.predict``.

    Returns:
        Logits of shape ``(rows, classes)``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "logits.safetensors")
        command = [sys.executable, "-m", "examples.support.predict", str(folder), str(output), "--tasks", *TASKS]
        command += ["--rows", str(rows), "--max-length", str(MAX_LENGTH), *arguments]
        subprocess.run(command, check=True)
        return load_file(output)["logits"]


def main() -> None:
    """Train, evaluate, save, reload, export, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="soft_frobenius")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=2000, help="training rows per task; a fifth as many for the test")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    started = time.monotonic()

    tasks = [load_task(name) for name in TASKS]
    tokenizer = load_tokenizer()
    splits = encode_splits(tasks, tokenizer, options.rows)
    print(f"linear probes on the frozen encoder, {len(TASKS)} tasks", flush=True)
    probe = probe_accuracies(load_base(1, seed=0), splits, tokenizer)

    trainer = train(tasks, splits, tokenizer, options)
    model = trainer.model.eval()
    logits = [predict_logits(model, rows, tokenizer) for rows in splits["test"]]
    predict, accuracies = make_metrics(label_offsets(tasks))
    labels = torch.tensor([label for rows in splits["test"] for label in rows["labels"]])
    scores = accuracies(EvalPrediction(predict(torch.cat(logits), labels).numpy(), labels.numpy()))

    folder = options.output / "hyperadapter"
    model.save_pretrained(folder)
    if not torch.equal(predict_in_fresh_process(folder, options.rows // 5, "--plugin"), torch.cat(logits)):
        raise RuntimeError("The reloaded hyperadapter predicts differently.")
    print(f"saved to {folder}, reloaded in a fresh process: predictions identical", flush=True)

    exported = options.output / f"lora-{EXPORTED}"
    export_lora(model, EXPORTED, exported)
    plain = predict_in_fresh_process(exported, options.rows // 5, "--only", EXPORTED)
    difference = (plain - logits[TASKS.index(EXPORTED)]).abs().max().item()
    if difference > EXPORT_TOLERANCE:
        raise RuntimeError(f"The exported LoRA predicts differently: its logits are off by {difference:.1e}.")
    print(f"exported {EXPORTED} to {exported}, loaded by plain peft: logits differ by {difference:.1e}")

    trainable, total = model.get_nb_trainable_parameters()
    save_card(
        model,
        folder,
        module="examples.quickstart",
        title="Quickstart: seven text tasks in one hyperadapter",
        usage=classifier_usage(label_offsets(tasks)[-1], folder),
        results={
            task.name: {"accuracy": scores[task.name], "accuracy of a linear probe": accuracy}
            for task, accuracy in zip(tasks, probe, strict=True)
        },
        training={
            "steps": options.steps,
            "batch_size": BATCH_SIZE,
            "learning_rate": options.learning_rate,
            "rows per task": options.rows,
            "tokens per row": MAX_LENGTH,
            "seed": 0,
            "trainable parameters": trainable,
        },
        log_history=trainer.state.log_history,
    )
    print(f"\n{'task':<16}{'classes':>8}{'linear probe':>14}{'hyperadapter':>14}")
    for task, accuracy in zip(tasks, probe, strict=True):
        print(f"{task.name:<16}{len(task.labels):>8}{accuracy:>14.3f}{scores[task.name]:>14.3f}")
    print(f"\ntrainable parameters: {trainable:,} of {total:,}; seconds: {time.monotonic() - started:.0f}")
    print(
        f"mean accuracy: linear probe {np.mean(probe):.3f}, hyperadapter {scores['mean']:.3f} over {len(TASKS)} tasks"
    )


if __name__ == "__main__":
    main()
