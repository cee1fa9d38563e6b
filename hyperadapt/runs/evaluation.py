"""How well a model does on one task: loss, and accuracy of classes or of generated answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hyperadapt.recipes.tokens import collator
from hyperadapt.trainer.losses import IGNORED, row_losses

Progress = Callable[[int], Any]


@torch.no_grad()
def class_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task: str,
    own: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
) -> dict[str, float]:
    """Score a classifier where each row competes among its own task's classes only.

    Args:
        model: The model, in evaluation mode.
        tokenizer: The tokenizer.
        dataset: Tokenised rows with ``labels``.
        task: Their task.
        own: Class ids of the task's labels.
        batch_size: Rows at once.
        progress: Told the number of rows after each batch.

    Returns:
        ``accuracy``, ``loss`` (mean cross entropy), ``rows``, and ``majority``: the share of the most frequent label.
    """
    device = next(model.parameters()).device
    classes = torch.tensor(own, device=device)
    right, loss = 0, 0.0
    collate = collator(tokenizer, "SEQ_CLS")
    for rows in _batches(dataset, batch_size):
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        labels = (batch.pop("labels")[:, None] == classes).int().argmax(1)
        logits = model(**batch, tasks=task).logits[:, classes].float()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        progress(len(rows))
    count = len(dataset)
    return {"accuracy": right / count, "loss": loss / count, "rows": count, "majority": _majority(dataset["labels"])}


@torch.no_grad()
def completion_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task: str,
    *,
    batch_size: int,
    progress: Progress,
) -> dict[str, float]:
    """Score a language model: loss of the completions, and whether greedy generation writes exactly them.

    Args:
        model: The model, in evaluation mode.
        tokenizer: The tokenizer.
        dataset: Tokenised rows with ``labels``, -100 in the prompt.
        task: Their task.
        batch_size: Rows at once.
        progress: Told the number of rows after each batch.

    Returns:
        ``accuracy`` (exact matches, blanks at the ends aside), ``loss`` (mean over tokens), ``rows``, and
        ``majority``: the share of the most frequent completion.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(2, device=device)
    right = 0
    wanted: list[str] = []
    longest = max(sum(label != IGNORED for label in labels) for labels in dataset["labels"])
    collate = collator(tokenizer, "CAUSAL_LM")
    for rows in _batches(dataset, batch_size):
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        terms = row_losses(model(**batch, tasks=task), batch["labels"], shift=True)
        totals += torch.stack(terms).sum(1)
        prompts, completions = zip(*(_split(row) for row in rows), strict=True)
        given = _generated(model, tokenizer, prompts, task, longest)
        answers = [text.strip() for text in tokenizer.batch_decode(list(completions), skip_special_tokens=True)]
        right += sum(map(str.__eq__, given, answers))
        wanted += answers
        progress(len(rows))
    loss = float(totals[0] / totals[1])
    return {"accuracy": right / len(wanted), "loss": loss, "rows": len(wanted), "majority": _majority(wanted)}


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], task: str, max_new_tokens: int
) -> list[str]:
    pad = tokenizer.pad_token_id
    padded = [
        pad_sequence([torch.tensor(one) for one in rows], True, value, "left").to(model.device)
        for rows, value in ((prompts, pad), ([[1] * len(prompt) for prompt in prompts], 0))
    ]
    output: Tensor = model.generate(
        input_ids=padded[0],
        attention_mask=padded[1],
        tasks=task,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, padded[0].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _split(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
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
