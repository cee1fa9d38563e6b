"""Answers of a run's adapter to rows that need no labels, and how good answers in a file are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hyperadapt.config.checks import check_integer, shown
from hyperadapt.recipes.columns import read_objects
from hyperadapt.recipes.queries import Query, Row, checked_queries, read_rows
from hyperadapt.recipes.tokens import check_tokens, collator, prompt_tokens
from hyperadapt.runs.answer_lines import classified, completed
from hyperadapt.runs.evaluation import batches, generated, majority, summary
from hyperadapt.runs.run import Run
from hyperadapt.tuner.active import active_network


def predict(  # noqa: DOC502
    run: Run,
    rows: str | os.PathLike[str] | Sequence[Row],
    task: str | None = None,
    *,
    task_column: str = "task",
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Answer rows; of a classifier only a row's own task's labels compete. A batch may mix tasks.

    Args:
        run: The run.
        rows: Texts, or dicts with the columns that the run's recipe names; or a file of them, ``.jsonl``, ``.json``,
            ``.csv``, ``.tsv``, ``.parquet`` or, with a text in each line, ``.txt``.
        task: Task of all rows; None where a column says it, or the adapter has one task only.
        task_column: The column with the name of each row's task.
        batch_size: Rows at once.
        max_new_tokens: Tokens that a language model writes at most, the likeliest one each time.

    Returns:
        A dict for each row, in order. Of a classifier ``task``, ``text`` (and ``text_pair``), ``label``, ``score``,
        its probability, and ``scores``, label -> probability; of a language model ``task``, ``prompt`` and
        ``completion``. Where the row has a label or completion, it is ``expected``.

    Raises:
        ValueError: If there are no rows, a row does not say its task, a task is unknown, or a row cannot be read.
    """
    check_integer("batch_size", batch_size)
    check_integer("max_new_tokens", max_new_tokens)
    name = "Row" if isinstance(rows, Sequence) and not isinstance(rows, str) else f"{rows}, row"
    given = rows if isinstance(rows, Sequence) and not isinstance(rows, str) else read_rows(rows)
    return answers(
        run,
        checked_queries(
            [(f"{name} {place}", row) for place, row in enumerate(given, 1)], run.recipe, task, task_column
        ),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )


def answers(run: Run, queries: Sequence[Query], *, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """As ``predict``, of rows that are checked."""
    answer = _completions if run.recipe.task_type == "CAUSAL_LM" else _classes
    tokens = [_tokens(run, query) for query in queries]
    found: dict[int, dict[str, Any]] = {}
    with logging.tqdm(total=len(queries), desc="predicting", unit="row") as bar, torch.no_grad():
        for places in batches([one["input_ids"] for one in tokens], batch_size):
            chosen = [queries[place] for place in places]
            # One name is answered as by a pinned task.
            names: Any = [query.task for query in chosen]
            asked = {"tasks": names if len(set(names)) > 1 else names[0]}
            lines = answer(run, chosen, [tokens[place] for place in places], asked, max_new_tokens)
            found |= zip(places, lines, strict=True)
            bar.update(len(places))
    return [found[place] for place in range(len(queries))]


def _tokens(run: Run, query: Query) -> dict[str, Any]:
    if run.recipe.task_type == "CAUSAL_LM":
        return {"input_ids": prompt_tokens(query.place, query.texts[0], run.tokenizer, run.recipe.max_length)}
    length = min(run.recipe.max_length, run.tokenizer.model_max_length)
    tokens = dict(run.tokenizer(*query.texts, truncation=True, max_length=length))
    check_tokens(query.place, "text", tokens["input_ids"])
    return tokens


def _classes(
    run: Run, queries: Sequence[Query], tokens: Sequence[dict[str, Any]], asked: Mapping[str, Any], _: int
) -> list[dict[str, Any]]:
    config = active_network(run.model)[1].config
    device = next(run.model.parameters()).device
    batch = {name: value.to(device) for name, value in collator(run.tokenizer, "SEQ_CLS")(list(tokens)).items()}
    logits = run.model(**batch, **asked).logits.float()
    lines = []
    for query, row in zip(queries, logits, strict=True):
        labels = config.labels_of(query.task) or config.output_names()
        scores = dict(zip(labels.values(), row[list(labels)].softmax(0).tolist(), strict=True))
        lines.append(classified(query.task, query.texts, scores, query.expected))
    return lines


def _completions(
    run: Run,
    queries: Sequence[Query],
    tokens: Sequence[dict[str, Any]],
    asked: Mapping[str, Any],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    prompts = [one["input_ids"] for one in tokens]
    texts = generated(run.model, run.tokenizer, prompts, asked, [max_new_tokens] * len(prompts))
    return [
        completed(query.task, query.texts[0], text, query.expected) for query, text in zip(queries, texts, strict=True)
    ]


def evaluate_predictions(path: str | os.PathLike[str]) -> dict[str, Any]:  # noqa: DOC502
    """Measure answers that are in a file, as ``predict`` and ``evaluate`` give them; no model is loaded.

    Args:
        path: File of JSON objects, one in each line, with ``task``, ``expected`` and ``label`` or ``completion``.

    Returns:
        As of ``evaluate``. ``split`` is ``"predictions"``; a loss is None where the file has no ``scores``.

    Raises:
        ValueError: If the file is not there, or a row is no such object.
    """
    place = str(path)
    if not os.path.isfile(path):
        raise ValueError(f"{place!r} is no file. Name one that predict --output or evaluate --predictions wrote.")
    if Path(path).suffix not in (".jsonl", ".json"):
        raise ValueError(f"{place!r} holds no predictions: those are in a .jsonl file, an object in each line.")
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row, line in enumerate(read_objects(Path(path), place), 1):
        _check_line(f"{place}, row {row}", line)
        by_task.setdefault(line["task"], []).append(line)
    if not by_task:
        raise ValueError(f"{place!r} has no rows. Predict some.")
    return summary("predictions", {task: _scores(lines) for task, lines in by_task.items()})


def _check_line(place: str, line: Mapping[str, Any]) -> None:
    answer = next((name for name in ("label", "completion") if name in line), None)
    for name in ("task", answer):
        if name is None or not isinstance(line.get(name), str):
            raise ValueError(
                f"{place} is {shown(dict(line))}, which is no prediction: it needs the texts 'task', and 'label' or "
                "'completion', as predict writes them."
            )
    if not isinstance(line.get("expected"), str):
        raise ValueError(
            f"{place} has no 'expected' answer to compare with. Predict rows that have a label, or a completion."
        )


def _scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right = [str(line.get("label", line.get("completion"))).strip() == line["expected"].strip() for line in lines]
    losses = [_loss(line) for line in lines]
    return {
        "accuracy": sum(right) / len(right),
        "loss": None if None in losses else sum(loss for loss in losses if loss is not None) / len(losses),
        "rows": len(lines),
        "majority": majority([line["expected"].strip() for line in lines]),
    }


def _loss(line: Mapping[str, Any]) -> float | None:
    """The cross-entropy of the expected label; None where its probability is not told."""
    scores = line.get("scores")
    score = scores.get(line["expected"]) if isinstance(scores, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        return None
    return -math.log(score) if score else math.inf
