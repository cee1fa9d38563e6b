"""Train the demo's adapter on yes/no tasks that only their descriptions tell apart: `python -m examples.space.train`.

Takes about a quarter of an hour on one CPU core. Tasks, settings and what is held out are those of
`benchmarks.concepts`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from benchmarks.concepts.arms import ARMS, RANK, TARGETS, trained_wordings
from benchmarks.concepts.data import ConceptTexts, Size, read_texts
from benchmarks.concepts.evaluation import Amount
from benchmarks.concepts.plan import OURS
from benchmarks.concepts.runs import draws, share_of_rate
from benchmarks.concepts.tasks import CORPORA
from examples.space.describer import Describer
from examples.space.facts import Concept, Facts, Score
from examples.space.reader import FOLDER, Reader
from examples.support.encoder import load_base, load_tokenizer
from hyperadapt import HyperAdapterConfig

ARM = ARMS[OURS]
RATE = 2e-3
LAYERS = [3, 4, 5]
BASE = "sentence-transformers/all-MiniLM-L6-v2"


def main() -> None:
    """Train, save, and measure what the demo tells its users."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=80, help="texts of a class at most")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    size = Size(corpora=tuple(options.corpora), texts=options.texts)
    texts = read_texts(load_tokenizer(), size)
    model = train(texts, options.steps, size.max_length)
    # Whether the vocabulary was changed would be looked up on the Hub.
    model.save_pretrained(options.output, save_embedding_layers=False)
    facts = Facts(size.max_length, concepts_of(texts), unseen=None, trained=None)
    facts.save(options.output)
    reader = Reader(options.output)
    unseen, trained = score(reader, texts, "test"), score(reader, texts, "train")
    facts._replace(unseen=unseen, trained=trained).save(options.output)
    print(f"unseen concepts: {unseen}\ntrained concepts, new texts: {trained}\nsaved in {options.output}")


def train(texts: ConceptTexts, steps: int, max_length: int) -> PeftModel:
    """The adapter of the upper three layers, in evaluation mode."""
    tokenizer, tasks = load_tokenizer(), texts.trainable(texts.tasks["train"])
    config = HyperAdapterConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        layers_to_transform=LAYERS,
        modules_to_save=["classifier"],
        tasks={task.name: trained_wordings(task) for task in tasks},
        task_embedding="text",
        text_encoder=Describer(),
        **ARM.fields,
    )
    torch.manual_seed(0)
    model = get_peft_model(load_base(2, seed=0), config).train()
    # Else it would be a folder of this machine.
    model.peft_config["default"].base_model_name_or_path = BASE
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    started = time.monotonic()
    for step, drawn in enumerate(draws(texts, tasks, Amount(steps), 0, ARM.alone)):
        optimizer.param_groups[0]["lr"] = RATE * share_of_rate(step / steps)
        rows = [texts.texts[place].text for place in drawn.places]
        batch = tokenizer(rows, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        loss = model(**batch, labels=drawn.labels, tasks=2 * [task.name for task in drawn.tasks]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def concepts_of(texts: ConceptTexts) -> list[Concept]:
    """What the demo offers: each concept alone, the trained ones first."""
    return [
        Concept(task.name, task.wordings[0], role == "train")
        for role in ("train", "test")
        for task in texts.tasks[role]
        if task.family == "atomic"
    ]


def score(reader: Reader, texts: ConceptTexts, role: str) -> Score:
    """Mean accuracy over concepts of a role, on texts that were never trained: by their own description, by another."""
    own, other = [], []
    for task in texts.tasks[role]:
        rows = texts.evaluation(task, "test", 16) if task.family == "atomic" else None
        if rows:
            own.append(accuracy(reader, texts, task.wordings[0], rows))
            other.append(accuracy(reader, texts, reader.control(task.wordings[0]), rows))
    return Score(len(own), sum(own) / len(own), sum(other) / len(other))


def accuracy(reader: Reader, texts: ConceptTexts, description: str, rows: tuple[list[int], list[bool]]) -> float:
    """Share of right answers."""
    shares = reader.yes([texts.texts[place].text for place in rows[0]], description)
    return sum((share > 0.5) == answer for share, answer in zip(shares, rows[1], strict=True)) / len(shares)


if __name__ == "__main__":
    main()
