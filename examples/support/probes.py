"""Linear probes on the frozen encoder, which a trained adapter is compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from examples.support.data import TextData
from examples.support.encoder import MeanPoolingClassifier, batches, load_base

STRENGTHS = (0.01, 0.1, 1.0)


def probe_accuracies(data: TextData) -> dict[str, float]:
    """Test accuracy of a logistic regression per task, regularised as is best on the validation rows."""
    model = load_base(1, seed=0)
    accuracies = {}
    for name in data.descriptions:
        embedded = {split: _embed(model, data[split][name], data) for split in ("train", "validation", "test")}
        probes = [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(*embedded["train"])
            for strength in STRENGTHS
        ]
        best = max(probes, key=lambda probe: probe.score(*embedded["validation"]))
        accuracies[name] = float(best.score(*embedded["test"]))
    return accuracies


def print_comparison(
    model: PeftModel, data: TextData, probes: Mapping[str, float], scores: Mapping[str, float]
) -> None:
    """A line for each task, and the means."""
    print(f"\n{'task':<16}{'classes':>8}{'linear probe':>14}{'hyperadapter':>14}")
    for task in data.tasks:
        print(f"{task.name:<16}{len(task.labels):>8}{probes[task.name]:>14.3f}{scores[task.name]:>14.3f}")
    trainable, total = model.get_nb_trainable_parameters()
    seconds = time.monotonic() - data.started
    print(f"\ntrainable parameters: {trainable:,} of {total:,}; seconds: {seconds:.0f}")
    mean = np.mean(list(probes.values()))
    print(f"mean accuracy: linear probe {mean:.3f}, hyperadapter {scores['mean']:.3f} over {len(data.tasks)} tasks")


@torch.no_grad()
def _embed(model: MeanPoolingClassifier, rows: Dataset, data: TextData) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (rows, hidden_size) and labels (rows,)."""
    features = [
        model.embed(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        for batch in batches(rows, data.tokenizer)
    ]
    return torch.cat(features).numpy(), np.asarray(rows["labels"])
