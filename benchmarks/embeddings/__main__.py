"""Embeddings for several uses: MiniLM as it is, with one LoRA, with a LoRA for each data set, and with a hyperadapter.

    python -m benchmarks.embeddings

Questions are to find passages, and the same question in other spelling; other vectors are to tell kinds of questions,
and topics of posts. All arms adapt the upper two of MiniLM's six layers with as many parameters (rank 8, and 11 and 44
for the LoRAs), and see equally many pairs, the same for a seed. Each chooses its learning rate on validation rows with
one seed, and is reported on test rows with others. Rows are added to a file one by one, and what is in it is not run
again.

With --fast it runs a few steps of all arms; with --report it prints the tables of the rows.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from transformers.utils import logging

from benchmarks.common.rows import Row, append_row, environment, read_rows
from benchmarks.embeddings.base import base
from benchmarks.embeddings.report import report
from examples.support.embedding_texts import COLUMNS, DATA, USES, Amount, Vectors, scores, training_data
from hyperadapt import HyperAdapterConfig
from hyperadapt.sentence_transformers import MultiTaskSentenceTransformerTrainer, add_hyperadapter

LAYERS = [1, 2]
MODULES = ["query", "key", "value", "dense"]
CHOOSING_SEED = 0
FROZEN, ONE, SEPARATE, OURS = "frozen", "one LoRA", "a LoRA per data set", "hyperadapter"
RATES = {FROZEN: (0.0,), ONE: (3e-4, 1e-3, 4e-3), SEPARATE: (3e-4, 1e-3, 4e-3), OURS: (5e-4, 2e-3, 8e-3)}


class Study(NamedTuple):
    """What is run: steps of all data sets together, pairs of a step, seeds, and amounts of texts."""

    steps: int = 120
    batch_size: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    amount: Amount = Amount(480, 300, 150, 300)


FAST = Study(4, 4, (1,), Amount(8, 12, 12, 12))


def adapted(arm: str, seed: int) -> SentenceTransformer:
    """MiniLM with what an arm trains."""
    torch.manual_seed(seed)
    model = base()
    if arm == OURS:
        config = HyperAdapterConfig(r=8, target_modules=MODULES, layers_to_transform=LAYERS, tasks=USES)
        return add_hyperadapter(model, config)
    # As many parameters as the hypernetwork has, and one LoRA for all as many as one for each.
    r = 11 * len(DATA) if arm == ONE else 11
    model.add_adapter(LoraConfig(r=r, lora_alpha=r, target_modules=MODULES, layers_to_transform=LAYERS))
    return model


def trained(arm: str, data: Sequence[str], rate: float, seed: int, study: Study) -> tuple[SentenceTransformer, float]:
    """A model that was trained on some of the data sets, as many steps of each as all arms do; and its loss."""
    model = adapted(arm, seed)
    pairs = {name: rows for name, rows in training_data(study.amount, seed).items() if name in data}
    rankings = ("retrieval", "duplicates")
    losses = {name: (MultipleNegativesRankingLoss if name in rankings else CoSENTLoss)(model) for name in data}
    trainer = MultiTaskSentenceTransformerTrainer if arm == OURS else SentenceTransformerTrainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=study.steps * len(data) // len(DATA),
            per_device_train_batch_size=study.batch_size,
            learning_rate=rate,
            warmup_steps=0.1,
            multi_dataset_batch_sampler="round_robin",
            router_mapping=COLUMNS if arm == OURS else {},
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = trainer(model, arguments, pairs, loss=losses).train().training_loss
    return model, loss


def run_once(arm: str, rate: float, seed: int, split: str, study: Study) -> Row:
    """Train and evaluate an arm."""
    started = time.process_time()
    parts = [[name] for name in DATA] if arm == SEPARATE else [list(DATA)]
    found: dict[str, float] = {}
    losses, parameters, seconds = [], 0, 0.0
    for part in parts:
        if arm == FROZEN:
            model = base()
        else:
            before = time.process_time()
            model, loss = trained(arm, part, rate, seed, study)
            seconds += time.process_time() - before
            losses.append(loss)
            parameters += sum(one.numel() for one in model.parameters() if one.requires_grad)
        found |= scores(encoder(model, arm), split, study.amount, part)
    return {
        "scores": {name: round(value, 4) for name, value in found.items()},
        "loss": round(sum(losses) / len(losses), 4) if losses else None,
        "parameters": parameters,
        "train_cpu_seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def encoder(model: SentenceTransformer, arm: str) -> Callable[[Sequence[str], str], Vectors]:
    """Texts and their task to vectors; only a hyperadapter is told the task."""

    def encode(texts: Sequence[str], task: str) -> Vectors:
        tasks: dict[str, Any] = {"tasks": task} if arm == OURS else {}
        return model.encode(list(texts), batch_size=50, normalize_embeddings=True, show_progress_bar=False, **tasks)

    return encode


def missing(rows: Sequence[Row], arms: Sequence[str], study: Study) -> Iterator[Row]:
    """Runs that are not in the rows, those to choose a rate first."""
    done = {(row["arm"], row["rate"], row["seed"], row["split"]) for row in rows}
    choices = [(arm, rate, CHOOSING_SEED, "validation") for arm in arms if arm != FROZEN for rate in RATES[arm]]
    wanted = [one for one in choices if one not in done]
    if not wanted:
        # The frozen model has no seed.
        pairs = [(seed, arm) for seed in study.seeds for arm in arms if arm != FROZEN or seed == study.seeds[0]]
        wanted = [(arm, chosen_rate(rows, arm), seed, "test") for seed, arm in pairs]
    yield from (dict(zip(("arm", "rate", "seed", "split"), one, strict=True)) for one in wanted if one not in done)


def chosen_rate(rows: Sequence[Row], arm: str) -> float:
    """The rate with the best mean score on validation rows."""
    means = {
        row["rate"]: sum(row["scores"].values()) for row in rows if row["arm"] == arm and row["split"] == "validation"
    }
    return max(means, key=lambda rate: means[rate]) if means else RATES[arm][0]


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--arms", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    study = FAST if options.fast else Study()
    file = options.output / "embeddings.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    while not options.report:
        run = next(missing(read_rows(file), options.arms, study), None)
        if run is None:
            break
        row = run_once(**run, study=study)
        append_row(file, environment() | run | row)
        print(run | row, flush=True)
    report(read_rows(file))


if __name__ == "__main__":
    main()
