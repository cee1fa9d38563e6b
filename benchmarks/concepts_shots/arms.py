"""The arms of the study of few texts: what a held-out concept gets from a description or from labelled texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from benchmarks.concepts.arms import ARMS as CONCEPT_ARMS
from benchmarks.concepts.arms import RANK, TARGETS, ConceptReader, build, text_encoder
from benchmarks.concepts.data import ConceptData, padded
from benchmarks.concepts.evaluation import Evaluation, measured
from benchmarks.concepts.plan import OURS
from benchmarks.concepts.runs import margins_of, optimised
from benchmarks.concepts.tasks import Task
from hyperadapt import HyperAdapterConfig, LoraGenerator

if TYPE_CHECKING:
    from benchmarks.concepts_shots.plan import Settings

DESCRIPTION, EXAMPLES, LOGISTIC = "description", "examples", "logistic regression"
NEW, FROM_ITS, FROM_ANOTHER = "new LoRA", "LoRA from its description", "LoRA from another description"
WARMUP_STEPS = 2
CLIP_AT = 1.0
# As many as an adapter reads at once.
MOST_READ = 32
# Of a trained concept, from which training draws.
GIVEN = 64

Rows = list[dict[str, Any]]
# Steps -> "atomic" -> concept -> accuracy and area under the curve.
Scores = dict[str, dict[str, dict[str, tuple[float, float]]]]


@dataclass(frozen=True)
class Arm:
    """One way to a concept.

    Attributes:
        is_lora: Whether a LoRA is trained.
        reads_texts: Whether it needs labelled texts.
        least: So many at least.
        rate_of: The arm whose learning rate it has; by default its own.
    """

    is_lora: bool = False
    reads_texts: bool = True
    least: int = 0
    rate_of: str | None = None


ARMS = {
    DESCRIPTION: Arm(reads_texts=False),
    LOGISTIC: Arm(),
    EXAMPLES: Arm(),
    NEW: Arm(is_lora=True),
    FROM_ITS: Arm(is_lora=True, least=8),
    FROM_ANOTHER: Arm(is_lora=True, least=8, rate_of=FROM_ITS),
}


class Shots:
    """A seed: its trained hyperadapters, and the texts that each held-out concept gets."""

    def __init__(self, data: ConceptData, settings: Settings, seed: int, folder: Path) -> None:
        self.data, self.settings, self.seed, self.folder = data, settings, seed, folder
        self.tasks = data.trainable(data.tasks["train"])
        self.evaluation = Evaluation(data, CONCEPT_ARMS[OURS], self.tasks, settings.amount, seed)

    def scores(self, arm: str, rate: float, n: int, role: str) -> Scores:
        """Scores of the concepts of a role that have enough texts."""
        scores: Scores = {}
        for task in self.data.tasks[role]:
            rows = self.data.evaluation(task, role, self.settings.amount.most(task))
            if task.family != "atomic" or rows is None or (chosen := self.chosen(task, role, n)) is None:
                continue
            for steps, margins in self._margins(arm, rate, task, chosen, rows[0]):
                found = scores.setdefault(str(steps), {"atomic": {}})
                found["atomic"][task.name] = measured(margins, rows[1])
        return scores

    def chosen(self, task: Task, role: str, n: int) -> list[int] | None:
        """Places of n texts, a yes and a no in turn, none of which is evaluated; None if there are fewer."""
        rows = self.data.evaluation(task, role, self.settings.amount.most(task))
        used = set(rows[0] if rows else ())
        pairs: list[tuple[int, int]] = []
        for pool in self.data.pools(task, role):
            generator = np.random.default_rng([self.seed, len(pairs), *task.name.encode()])
            yes, no = (generator.permutation([place for place in side if place not in used]) for side in pool)
            # Of one corpus, so that a predicate is not told by that.
            pairs += [(int(one), int(other)) for one, other in zip(yes, no, strict=False)]
        if len(pairs) < n // 2:
            return None
        order = np.random.default_rng([self.seed, *task.name.encode()]).permutation(len(pairs))[: n // 2]
        return [place for index in order for place in pairs[index]]

    def _margins(
        self, arm: str, rate: float, task: Task, chosen: list[int], asked: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """After how many steps -> logits of yes less those of no, for the texts that are asked."""
        if arm == DESCRIPTION:
            margins = margins_of(self.reader, CONCEPT_ARMS[OURS], self.data, self.tasks)
            yield 0, margins(asked, *self.evaluation.true(task))
        elif arm == LOGISTIC:
            classifier = LogisticRegression(C=rate, max_iter=1000)
            classifier.fit(self.data.vectors[chosen].numpy(), _labels(chosen))
            yield 0, torch.from_numpy(classifier.decision_function(self.data.vectors[asked].numpy()))
        elif arm == EXAMPLES:
            embedding = self.example_reader.embed_examples(
                _rows(self.data, chosen[:MOST_READ], _labels(chosen)[:MOST_READ]), data_collator=_collate
            )
            yield 0, _asked(self.example_reader, self.data, asked, task_embeddings=embedding)
        else:
            model = self._started(arm, task)
            for steps in self._trained(model, chosen, rate):
                yield steps, _asked(model, self.data, asked)

    def _started(self, arm: str, task: Task) -> PeftModel:
        """A plain LoRA, as it starts."""
        torch.manual_seed(self.seed)
        base = ConceptReader(copy.deepcopy(self.data.encoder.upper), "logits")
        if arm == NEW:
            fields: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["head"]}
            return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, **fields))
        described = self.evaluation.true(task) if arm == FROM_ITS else self.evaluation.wrong(task)["shuffled"]
        encode = text_encoder(CONCEPT_ARMS[OURS], self.data, [])
        made = self.generator.from_description(described[0], text_encoder=encode)
        config = copy.deepcopy(self.generator.lora_config)
        config.inference_mode = False
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, made.state_dict())
        return model

    def _trained(self, model: PeftModel, chosen: list[int], rate: float) -> Iterator[int]:
        """Train on texts, and stop after each number of steps that is measured."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
        generator, labels = np.random.default_rng(self.seed), dict(zip(chosen, _labels(chosen), strict=True))
        waiting: list[int] = []
        for step in range(1, self.settings.measured_after[-1] + 1):
            if len(waiting) < min(self.settings.batch, len(chosen)):
                waiting += [chosen[index] for index in generator.permutation(len(chosen))]
            places, waiting = waiting[: self.settings.batch], waiting[self.settings.batch :]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / WARMUP_STEPS)
            batch = self.data.padded(places) | {"labels": torch.tensor([labels[place] for place in places])}
            model.train()(**batch).loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_AT)
            optimizer.step()
            optimizer.zero_grad()
            if step in self.settings.measured_after:
                yield step

    @cached_property
    def reader(self) -> PeftModel:
        """The hyperadapter that reads descriptions."""
        model = build(CONCEPT_ARMS[OURS], self.data, self.tasks, self.seed)
        return self._kept("descriptions", model, self.settings.trained_rate)

    @cached_property
    def generator(self) -> LoraGenerator:
        """What makes LoRAs of descriptions."""
        return LoraGenerator.from_model(self.reader)

    @cached_property
    def example_reader(self) -> PeftModel:
        """The hyperadapter that reads labelled texts."""
        torch.manual_seed(self.seed)
        config = HyperAdapterConfig(
            tasks=[task.name for task in self.tasks],
            task_embedding="examples",
            r=RANK,
            lora_alpha=RANK,
            target_modules=TARGETS,
            modules_to_save=["head"],
            **CONCEPT_ARMS[OURS].fields,
        )
        model = get_peft_model(ConceptReader(copy.deepcopy(self.data.encoder.upper), "logits"), config)
        given = {task.name: self._given(task) for task in self.tasks}
        prepare = partial(model.set_examples, given, data_collator=_collate)
        return self._kept("examples", model, self.settings.trained_rate, prepare)

    def _given(self, task: Task) -> Rows:
        """Labelled texts of a trained concept, as many of either answer where there are."""
        generator = np.random.default_rng([self.seed, *task.name.encode()])
        rows: Rows = []
        for side, label in (("yes", 1), ("no", 0)):
            places = np.concatenate([getattr(pool, side) for pool in self.data.pools(task, "train")])
            taken = generator.permutation(places)[: GIVEN // 2].tolist()
            rows += _rows(self.data, taken, [label] * len(taken))
        return rows

    def _kept(self, name: str, model: PeftModel, rate: float, prepare: Callable[[], None] | None = None) -> PeftModel:
        """A hyperadapter with the weights that were kept, or else trained now; in evaluation mode."""
        path = self.folder / f"shots_{name}_{self.settings.definition}_{self.seed}.pt"
        if path.exists():
            set_peft_model_state_dict(model, torch.load(path))
            return model.eval()
        if prepare is not None:
            prepare()
        # Read from examples, concepts have no wordings to draw; else all is the same.
        optimised(model, CONCEPT_ARMS[OURS], self.data, self.tasks, rate, self.seed, self.settings.amount)
        torch.save(get_peft_model_state_dict(model), path)
        return model.eval()


def _labels(chosen: Sequence[int]) -> list[int]:
    """A yes and a no in turn."""
    return [1 - index % 2 for index in range(len(chosen))]


def _rows(data: ConceptData, places: Sequence[int], labels: Sequence[int]) -> Rows:
    return [{"states": data.states[place], "label": label} for place, label in zip(places, labels, strict=True)]


def _collate(rows: Rows) -> dict[str, Tensor]:
    return padded([row["states"] for row in rows]) | {"labels": torch.tensor([row["label"] for row in rows])}


@torch.no_grad()
def _asked(model: PeftModel, data: ConceptData, places: Sequence[int], **condition: Tensor) -> Tensor:
    logits: Tensor = model.eval()(**data.padded(places), **condition).logits
    return logits[:, 1] - logits[:, 0]
