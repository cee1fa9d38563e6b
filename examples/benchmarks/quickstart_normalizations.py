"""The quickstart once with every normalisation: `python -m examples.benchmarks.quickstart_normalizations`.

One seed and one learning rate: it shows that each method trains, not which one is best.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import EvalPrediction

from examples.benchmarks.rows import save_rows
from examples.encoder import label_offsets, load_tokenizer, predict_logits
from examples.quickstart import TASKS, encode_splits, make_metrics, train
from examples.text_tasks import load_task
from hyperadapt.methods import NORMALIZATIONS


def main() -> None:
    """Train with every method, print a line each, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000, help="training rows per task; a fifth as many for the test")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--normalizations", nargs="+", choices=NORMALIZATIONS, default=NORMALIZATIONS)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_normalizations"))
    options = parser.parse_args()

    tasks = [load_task(name) for name in TASKS]
    tokenizer = load_tokenizer()
    splits = encode_splits(tasks, tokenizer, options.rows)
    labels = torch.tensor([label for rows in splits["test"] for label in rows["labels"]])
    predict, accuracies = make_metrics(label_offsets(tasks))
    results = []
    for normalization in options.normalizations:
        started = time.monotonic()
        options.normalization = normalization
        trainer = train(tasks, splits, tokenizer, options)
        model = trainer.model.eval()
        logits = torch.cat([predict_logits(model, rows, tokenizer) for rows in splits["test"]])
        scores = accuracies(EvalPrediction(predict(logits, labels).numpy(), labels.numpy()))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        losses, gradient_norms = ([float(log[name]) for log in logs] for name in ("loss", "grad_norm"))
        results.append(
            {
                "normalization": normalization,
                "mean_test_accuracy": scores["mean"],
                "last_loss": losses[-1],
                "largest_logged_gradient_norm": max(gradient_norms),
                "finite": all(map(math.isfinite, losses + gradient_norms)),
                "seconds": time.monotonic() - started,
            }
            | {f"test_accuracy_{name}": scores[name] for name in TASKS}
        )
        print(results[-1], flush=True)

    print(f"\n{'normalization':<16}{'mean accuracy':>14}{'last loss':>11}{'largest gradient norm':>23}{'finite':>8}")
    for row in results:
        print(
            f"{row['normalization']:<16}{row['mean_test_accuracy']:>14.3f}{row['last_loss']:>11.3f}"
            f"{row['largest_logged_gradient_norm']:>23.2f}{row['finite']!s:>8}"
        )
    settings = {"steps": options.steps, "rows": options.rows, "learning_rate": options.learning_rate, "seed": 0}
    save_rows(options.output / "rows.json", [settings | row for row in results])


if __name__ == "__main__":
    main()
