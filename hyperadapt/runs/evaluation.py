"""How well a run does on its tasks: loss, and accuracy of classes or of generated answers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hyperadapt.config.checks import check_choice, check_integer, shown
from hyperadapt.listening import compare, has_text, neutral_conditions
from hyperadapt.recipes.base_models import positions_of
from hyperadapt.recipes.recipe import Recipe
from hyperadapt.recipes.rows import TaskRows, read_rows, sampled
from hyperadapt.recipes.schema import SPLITS
from hyperadapt.recipes.tokens import collator, tokenized
from hyperadapt.runs.answer_lines import classified, completed, write_predictions
from hyperadapt.runs.folder import RECIPE
from hyperadapt.runs.run import Run
from hyperadapt.trainer.losses import IGNORED, row_losses

Progress = Callable[[int], Any]
MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Answers:
    """What the rows of a task got: whether each was answered right, those with similar lengths together.

    ``places`` are the rows' numbers, from 0, and ``given`` what was answered: the probabilities of the task's own
    labels, or a text.
    """

    right: list[bool]
    loss: float
    # What the most frequent answer would reach.
    majority: float
    places: Sequence[int] = ()
    given: Sequence[Any] = ()

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
    limit: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure loss and accuracy task by task; every row competes among its own task's labels only.

    Args:
        run: The run.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: Names of tasks; None for all that have such a split.
        batch_size: Rows at once.
        controls: Whether to answer the rows also under other descriptions, see ``hyperadapt.controls``: up to nine
            times more work.
        limit: Rows of a task at most, drawn at random, always the same ones; None for all.
        predictions: File for the answer to each row, ``.jsonl``: a JSON object in each line, as of ``predict``.

    Returns:
        ``split``, and ``limit`` if it was given; ``tasks``, task -> ``accuracy`` (of language models: exact matches of
        greedily generated answers), ``loss``, ``rows``, ``majority`` (what the most frequent answer would reach) and,
        if asked for, ``controls``, the fields of ``hyperadapt.Controls`` and ``is_above``; ``mean``, the unweighted
        means over tasks; and ``no_better_than_majority``, the tasks that always giving the most frequent answer would
        do as well.

    Raises:
        ValueError: If a task is unknown, there is no such split, its data cannot be read, `predictions` is one of their
            files or ends otherwise, or an only task is to be compared with controls.
    """
    check_choice("split", split, SPLITS)
    known = run.recipe.tasks
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise ValueError(
            f"tasks names {shown(unknown)}, which are no tasks of the run. Its tasks: {shown(list(known))}."
        )
    names = list(dict.fromkeys(tasks)) if tasks else [name for name in known if getattr(known[name], split)]
    lacking = [name for name in names if getattr(known[name], split) is None]
    if lacking or not names:
        raise ValueError(
            f"The tasks {shown(lacking or list(known))} have no rows for split={split!r}. Name a file with such rows "
            f"in {RECIPE} of {run.folder}, or choose another split."
        )
    if limit is not None:
        check_integer("limit", limit, MAX_ROWS)
    if predictions is not None:
        _check_output(predictions, run.recipe)
    rows = {name: sampled(read_rows(run.recipe, name, split), limit) for name in names}
    data = {name: tokenize(one, run.recipe, run.tokenizer) for name, one in rows.items()}
    answers = _answered(run, split, data, batch_size)
    results = summary(split, {name: one.scores for name, one in answers.items()})
    if limit is not None:
        results["limit"] = limit
    if predictions is not None:
        lines = [line for name in names for line in _prediction_lines(name, rows[name], answers[name], run.recipe)]
        write_predictions(predictions, lines)
    if controls:
        for name, found in _controls(run, data, batch_size).items():
            results["tasks"][name]["controls"] = found
    return results


def _check_output(predictions: str | os.PathLike[str], recipe: Recipe) -> None:
    """Refuse a file that is not read again, and one of the run's own rows."""
    path = Path(predictions)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"predictions={str(path)!r} gets a JSON object in each line, but does not end in .jsonl. Name a file that "
            "does."
        )
    files = [file for task in recipe.tasks.values() for split in SPLITS if (file := getattr(task, split)) is not None]
    for file in files:
        if path.exists() and Path(file).exists() and path.samefile(file):
            raise ValueError(
                f"predictions={str(path)!r} holds rows of the run, which would be lost. Name another file."
            )


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
    return summary(split, {name: one.scores for name, one in _answered(run, split, data, batch_size).items()})


def _answered(run: Run, split: str, data: Mapping[str, Dataset], batch_size: int) -> dict[str, Answers]:
    total = sum(map(len, data.values()))
    with logging.tqdm(total=total, desc=f"evaluating {split}", unit="row") as bar:
        return {name: _answers(run, name, rows, batch_size, bar.update, {"tasks": name}) for name, rows in data.items()}


def summary(split: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is told of the scores by task; a mean is None where a task has no such score."""
    mean = {}
    for metric in ("accuracy", "loss", "majority"):
        values = [one[metric] for one in scores.values()]
        mean[metric] = None if None in values else sum(values) / len(values)
    weak = [name for name, values in scores.items() if is_no_better(values)]
    return {"split": split, "tasks": dict(scores), "mean": mean, "no_better_than_majority": weak}


def _prediction_lines(name: str, rows: TaskRows, answers: Answers, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The answers to a task's rows, in their order."""
    given = dict(zip(answers.places, answers.given, strict=True))
    for place, texts in enumerate(rows.texts):
        if recipe.task_type == "CAUSAL_LM":
            prompt, completion = texts
            expected = completion if isinstance(completion, str) else completion[-1]["content"]
            yield completed(name, prompt, given[place], expected)
        else:
            own = recipe.tasks[name].labels or ()
            yield classified(name, texts, dict(zip(own, given[place], strict=True)), rows.labels[place])


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
    order: list[int] = []
    given: list[list[float]] = []
    loss = 0.0
    collate = collator(tokenizer, "SEQ_CLS")
    for places in batches(dataset["input_ids"], batch_size):
        rows = dataset.select(places).to_list()
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        labels = (batch.pop("labels")[:, None] == classes).int().argmax(1)
        logits = model(**batch, **asked).logits[:, classes].float()
        right += (logits.argmax(1) == labels).tolist()
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        order += places
        given += logits.softmax(1).tolist()
        progress(len(rows))
    return Answers(right, loss / len(dataset), majority(dataset["labels"]), order, given)


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
    order: list[int] = []
    texts: list[str] = []
    collate = collator(tokenizer, "CAUSAL_LM")
    for places in batches(dataset["input_ids"], batch_size):
        rows = dataset.select(places).to_list()
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        terms = row_losses(model(**batch, **asked)["logits"], batch["labels"], shift=True)
        totals += torch.stack(terms).sum(1)
        prompts, completions = zip(*(split_dialogue(row) for row in rows), strict=True)
        given = generated(model, tokenizer, prompts, asked, list(map(len, completions)))
        answers = [text.strip() for text in tokenizer.batch_decode(list(completions), skip_special_tokens=True)]
        right += map(str.__eq__, given, answers)
        wanted += answers
        order += places
        texts += given
        progress(len(rows))
    return Answers(right, float(totals[0] / totals[1]), majority(wanted), order, texts)


def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    asked: Mapping[str, Any],
    lengths: Sequence[int],
) -> list[str]:
    """What a language model writes after prompts, the likeliest token each time, as far as it can read."""
    length, positions = max(lengths), positions_of(model.config)
    if positions is not None and max(map(len, prompts)) + length > positions:
        if len(prompts) > 1:
            # A row may fit where the one's prompt and the other's completion do not.
            half = len(prompts) // 2
            parts = ((prompts[:half], lengths[:half]), (prompts[half:], lengths[half:]))
            return [text for part, counts in parts for text in generated(model, tokenizer, part, asked, counts)]
        # As a row that is cut loses its beginning.
        prompts = [prompts[0][-(positions - 1) :]]
        length = positions - len(prompts[0])
    pad = tokenizer.pad_token_id
    padded = [
        pad_sequence([torch.tensor(one) for one in rows], True, value, "left").to(model.device)
        for rows, value in ((prompts, pad), ([[1] * len(prompt) for prompt in prompts], 0))
    ]
    output: Tensor = model.generate(
        input_ids=padded[0],
        attention_mask=padded[1],
        **asked,
        max_new_tokens=length,
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


def batches(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Places of rows, by their tokens; those of similar length together, which saves most of the padding."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def majority(values: Sequence[Any]) -> float:
    """The share of the most frequent value."""
    [(_, count)] = Counter(values).most_common(1)
    return count / len(values)
