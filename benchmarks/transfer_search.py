"""Settings of the transfer benchmark: `python -m benchmarks.transfer_search`.

Held-out tasks have no part in it. Learning rates of the multi-task LoRA and of Poly are compared on the trained tasks'
validation rows. Learning rates and steps of a new LoRA on few examples are compared on two of the trained tasks; so are
the ways of conditioning the hyperadapter, which is trained on the other tasks alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peft import PeftModel

from benchmarks.rows import save_rows
from benchmarks.transfer import TRAINED_TASKS
from benchmarks.transfer_arms import HYPERADAPT, hyperadapt_rows
from benchmarks.transfer_baselines import (
    FRESH_RANK,
    Row,
    add_lora,
    fit_examples,
    poly_accuracy,
    train_lora,
    train_poly,
    trainable_state,
)
from benchmarks.transfer_data import TransferData, load_data
from examples.support.matching import accuracy
from hyperadapt.config import CONDITIONINGS

PARTS = ("lora", "poly", "fresh", "hyperadapt")
PROBES = ("tweet_sent", "reuters_r8")


def main() -> None:
    """Print a line per setting and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=(5e-4, 1e-3, 2e-3))
    parser.add_argument("--conditionings", nargs="+", choices=CONDITIONINGS, default=CONDITIONINGS)
    parser.add_argument("--few-shot-steps", type=int, nargs="+", default=(20, 60))
    parser.add_argument("--examples", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--parameters", type=int, default=2_000_000, help="trainable parameters to match")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/transfer_search"))
    options = parser.parse_args()
    for part in options.parts:
        if part == "hyperadapt":
            rows = _hyperadapt(options)
        else:
            rows = _multi_task(part, options) if part in ("lora", "poly") else _few_shot(options)
        save_rows(options.output / f"{part}.jsonl", rows)


def _multi_task(part: str, options: argparse.Namespace) -> list[Row]:
    data = load_data(TRAINED_TASKS, [], rows=options.rows, test_rows=options.test_rows, split="validation")
    rows = []
    for rate in options.learning_rates:
        train, test = (train_lora, _accuracy) if part == "lora" else (train_poly, poly_accuracy)
        model, extra = train(data, options.parameters, options.seed, options.steps, rate)
        mean = float(np.mean([test(model, data, name) for name in data.trained]))
        rows.append({"part": part, "learning_rate": rate, "steps": options.steps, "accuracy": mean, **extra})
        print(rows[-1], flush=True)
    return rows


def _hyperadapt(options: argparse.Namespace) -> list[Row]:
    rows = []
    data = _probe_data(options)
    for conditioning in options.conditionings:
        HYPERADAPT["conditioning"] = conditioning
        for row in hyperadapt_rows(data, options, options.seed):
            rows.append({"part": "hyperadapt", "conditioning": conditioning, **row})
            print(rows[-1], flush=True)
    return rows


def _few_shot(options: argparse.Namespace) -> list[Row]:
    data = _probe_data(options)
    model = add_lora(data, FRESH_RANK, options.seed)
    start = trainable_state(model)
    rows = [{"part": "fresh", "examples": 0, **_scores(data, lambda name: _accuracy(model, data, name))}]
    print(rows[-1], flush=True)
    grid = itertools.product(options.learning_rates, options.few_shot_steps, options.examples)
    for rate, steps, count in grid:
        started = time.monotonic()

        def score(name: str, rate: float = rate, steps: int = steps, count: int = count) -> float:
            model.load_state_dict(start, strict=False)
            examples = data.examples(name, count, options.seed)
            fit_examples(model, examples, data, options.seed, learning_rate=rate, steps=steps)
            return _accuracy(model, data, name)

        row = {"part": "fresh", "learning_rate": rate, "steps": steps, "examples": count, **_scores(data, score)}
        rows.append(row | {"seconds": time.monotonic() - started})
        print(rows[-1], flush=True)
    return rows


def _probe_data(options: argparse.Namespace) -> TransferData:
    others = [name for name in TRAINED_TASKS if name not in PROBES]
    return load_data(others, PROBES, rows=options.rows, test_rows=options.test_rows, split="validation")


def _accuracy(model: PeftModel, data: TransferData, name: str) -> float:
    return accuracy(model, data.test[name])


def _scores(data: TransferData, score: Callable[[str], float]) -> Row:
    scores = {name: score(name) for name in data.held_out}
    return {"accuracy": float(np.mean(list(scores.values()))), **scores}


if __name__ == "__main__":
    main()
