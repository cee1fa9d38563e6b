"""How well a run does on its tasks: loss, and accuracy of classes or of generated answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hyperadapt.config.checks import check_choice, shown
from hyperadapt.listening import compare, has_text, neutral_conditions
from hyperadapt.recipes.recipe import Recipe
from hyperadapt.recipes.rows import TaskRows, read_rows
from hyperadapt.recipes.schema import SPLITS
from hyperadapt.recipes.tokens import collator, tokenized
from hyperadapt.runs.folder import RECIPE
from hyperadapt.runs.run import Run
from hyperadapt.trainer.losses import IGNORED, row_losses

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Answers:
    """What the rows of a task got: whether each was answered right, those with similar lengths together."""

    right: list[bool]
    loss: float
    # What the most frequent answer would reach.
    majority: float

    @property
    def scores(self) -> dict[str, float]:
        """The figures of a record."""
        rows = len(self.right)
        return {"accuracy": sum(self.right) / rows, "loss": self.loss, "rows": rows, "majority": self.majority}


def evaluate(
    run: Run,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    *,
    controls: bool = False,
) -> dict[str, Any]:
    """Measure loss and accuracy task by task; every row competes among its own task's labels only.

    Args:
        run: The run.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: Names of tasks; None for all that have such a split.
        batch_size: Rows at once.
        controls: Whether to answer the rows also under other descriptions, see ``hyperadapt.controls``: up to nine
            times more work.

    Returns:
        ``split``; ``tasks``, task -> ``accuracy`` (of language models: exact matches of greedily generated answers),
        ``loss``, ``rows``, ``majority`` (what the most frequent answer would reach) and, if asked for, ``controls``,
        the fields of ``hyperadapt.Controls`` and ``is_above``; ``mean``, the unweighted means over tasks; and
        ``no_better_than_majority``, the tasks that always giving the most frequent answer would do as well.

    Raises:
        ValueError: If a task is unknown, there is no such split, its data cannot be read, or an only task is to be
            compared with controls.
    """
    check_choice("split", split, SPLITS)
    known = run.recipe.tasks
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise ValueError(
            f"tasks names {shown(unknown)}, which are no tasks of the run. Its tasks: {shown(list(known))}."
        )
    names = list(tasks) if tasks else [name for name in known if getattr(known[name], split)]
    lacking = [name for name in names if getattr(known[name], split) is None]
    if lacking or not names:
        raise ValueError(
            f"split={split!r} is not given for the tasks {shown(lacking or list(known))}. Name its file in {RECIPE} of "
            f"{run.folder}, or choose another split."
        )
    data = {name: tokenize(read_rows(run.recipe, name, split), run.recipe, run.tokenizer) for name in names}
    results = evaluate_rows(run, split, data, batch_size)
    if controls:
        for name, found in _controls(run, data, batch_size).items():
            results["tasks"][name]["controls"] = found
    return results


def _controls(run: Run, data: Mapping[str, Dataset], batch_size: int) -> dict[str, dict[str, Any]]:
    """Of each task, the controls of its accuracy."""
    described = any(has_text(run.model, name) for name in data)
    neutral = neutral_conditions(run.model, None) if described else {}
    found = {}
    with logging.tqdm(total=len(data), desc="controls", unit="task") as bar:
        for name, rows in data.items():
            metric = partial(_are_right, run=run, name=name, batch_size=batch_size)
            compared = compare(run.model, name, rows, metric, neutral if has_text(run.model, name) else {}, 0)
            found[name] = {**asdict(compared), "is_above": compared.is_above}
            bar.update()
    return found


def _are_right(model: nn.Module, rows: Dataset, *, run: Run, name: str, batch_size: int) -> list[bool]:
    return _answers(run, name, rows, batch_size, lambda count: None, {}).right


def tokenize(rows: TaskRows, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows as a recipe's model reads them."""
    return tokenized(rows, tokenizer, task_type=recipe.task_type, labels=recipe.labels, max_length=recipe.max_length)


def evaluate_rows(run: Run, split: str, data: Mapping[str, Dataset], batch_size: int) -> dict[str, Any]:
    """As ``evaluate``, for tokenised rows by task."""
    total = sum(map(len, data.values()))
    with logging.tqdm(total=total, desc=f"evaluating {split}", unit="row") as bar:
        scores = {
            name: _answers(run, name, rows, batch_size, bar.update, {"tasks": name}).scores
            for name, rows in data.items()
        }
    mean = {
        metric: sum(values[metric] for values in scores.values()) / len(scores)
        for metric in ("accuracy", "loss", "majority")
    }
    weak = [name for name, values in scores.items() if is_no_better(values)]
    return {"split": split, "tasks": scores, "mean": mean, "no_better_than_majority": weak}


def is_no_better(scores: Mapping[str, float]) -> bool:
    """Whether always giving a task's most frequent answer would do as well; never where no answer comes twice."""
    repeats = scores["majority"] * scores["rows"] > 1.5
    return repeats and scores["accuracy"] <= scores["majority"] < 1


def no_better_lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each task that always giving its most frequent answer would do as well."""
    found = ((name, results["tasks"][name]) for name in results["no_better_than_majority"])
    return [
        f"{name}: an accuracy of {scores['accuracy']:.3f} is no better than always giving its most frequent answer "
        f"({scores['majority']:.3f})"
        for name, scores in found
    ]


def _answers(
    run: Run, name: str, rows: Dataset, batch_size: int, progress: Progress, asked: Mapping[str, Any]
) -> Answers:
    """The answers of a task's rows, where the model is called with what is asked for, or for what is in force."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if run.recipe.task_type == "CAUSAL_LM":
        return completion_answers(run.model, run.tokenizer, rows, asked, **options)
    own = [run.recipe.labels.index(label) for label in run.recipe.tasks[name].labels or ()]
    return class_answers(run.model, run.tokenizer, rows, asked, own, **options)


@torch.no_grad()
def class_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    asked: Mapping[str, Any],
    own: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
) -> Answers:
    """Answers of a classifier; each row competes among its own task's classes alone."""
    device = next(model.parameters()).device
    classes = torch.tensor(own, device=device)
    right: list[bool] = []
    loss = 0.0
    collate = collator(tokenizer, "SEQ_CLS")
    for rows in _batches(dataset, batch_size):
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        labels = (batch.pop("labels")[:, None] == classes).int().argmax(1)
        logits = model(**batch, **asked).logits[:, classes].float()
        right += (logits.argmax(1) == labels).tolist()
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        progress(len(rows))
    return Answers(right, loss / len(dataset), _majority(dataset["labels"]))


@torch.no_grad()
def completion_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    asked: Mapping[str, Any],
    *,
    batch_size: int,
    progress: Progress,
) -> Answers:
    """Answers of a language model, right if greedy generation writes exactly the completion; the loss is by token."""
    device = next(model.parameters()).device
    totals = torch.zeros(2, device=device)
    right: list[bool] = []
    wanted: list[str] = []
    longest = max(sum(label != IGNORED for label in labels) for labels in dataset["labels"])
    collate = collator(tokenizer, "CAUSAL_LM")
    for rows in _batches(dataset, batch_size):
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        terms = row_losses(model(**batch, **asked)["logits"], batch["labels"], shift=True)
        totals += torch.stack(terms).sum(1)
        prompts, completions = zip(*(split_dialogue(row) for row in rows), strict=True)
        given = _generated(model, tokenizer, prompts, asked, longest)
        answers = [text.strip() for text in tokenizer.batch_decode(list(completions), skip_special_tokens=True)]
        right += map(str.__eq__, given, answers)
        wanted += answers
        progress(len(rows))
    return Answers(right, float(totals[0] / totals[1]), _majority(wanted))


def _generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    asked: Mapping[str, Any],
    max_new_tokens: int,
) -> list[str]:
    pad = tokenizer.pad_token_id
    padded = [
        pad_sequence([torch.tensor(one) for one in rows], True, value, "left").to(model.device)
        for rows, value in ((prompts, pad), ([[1] * len(prompt) for prompt in prompts], 0))
    ]
    output: Tensor = model.generate(
        input_ids=padded[0],
        attention_mask=padded[1],
        **asked,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, padded[0].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def split_dialogue(row: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the completion."""
    length = row["labels"].count(IGNORED)
    return row["input_ids"][:length], row["input_ids"][length:]


def _batches(dataset: Dataset, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of similar length together, which saves most of the padding."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield dataset.select(order[start : start + batch_size]).to_list()


def _majority(values: Sequence[Any]) -> float:
    [(_, count)] = Counter(values).most_common(1)
    return count / len(values)
