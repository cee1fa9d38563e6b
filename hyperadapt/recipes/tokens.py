"""From rows of text to tokens, as the model reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from hyperadapt.recipes.rows import TaskRows
from hyperadapt.trainer.losses import IGNORED


def tokenized(
    rows: TaskRows, tokenizer: PreTrainedTokenizerBase, *, task_type: str, labels: Sequence[str], max_length: int
) -> Dataset:
    """Tokens of rows in columns, ``labels`` included: ids of classes; or of tokens, -100 in the prompt."""
    # Of what is longer, texts lose their end and prompts their beginning.
    max_length = min(max_length, tokenizer.model_max_length)
    if task_type == "CAUSAL_LM":
        return Dataset.from_list(
            [
                _dialogue_tokens(f"{rows.place}, row {row}", prompt, completion, tokenizer, max_length)
                for row, (prompt, completion) in enumerate(rows.texts, 1)
            ]
        )
    columns = zip(*rows.texts, strict=True)
    encoded = dict(tokenizer(*map(list, columns), truncation=True, max_length=max_length))
    for row, tokens in enumerate(encoded["input_ids"], 1):
        check_tokens(f"{rows.place}, row {row}", "text", tokens)
    ids = {label: index for index, label in enumerate(labels)}
    return Dataset.from_dict({**encoded, "labels": [ids[label] for label in rows.labels]})


def collator(tokenizer: PreTrainedTokenizerBase, task_type: str) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """What makes padded batches of tokenised rows."""
    if task_type == "CAUSAL_LM":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def _dialogue_tokens(
    place: str, prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{place}: the tokenizer has no end-of-sequence token, so an answer would never end.")
    is_chat = not isinstance(prompt, str)
    if is_chat:
        prompt, completion = _chat_texts(place, prompt, completion, tokenizer)
    start = _opened(place, prompt, is_chat, tokenizer)
    end = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in end:
        end = [*end, tokenizer.eos_token_id]
    if len(end) >= max_length:
        raise ValueError(
            f"{place} has a completion of {len(end)} tokens, which leaves no room for a prompt in max_length="
            f"{max_length}. Raise max_length, or drop the row."
        )
    start = _last_of(start, max_length - len(end), tokenizer)
    return {
        "input_ids": start + end,
        "attention_mask": [1] * (len(start) + len(end)),
        "labels": [IGNORED] * len(start) + end,
    }


def prompt_tokens(place: str, prompt: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Tokens of a prompt alone, a text or messages, as they stand before a completion."""
    is_chat = not isinstance(prompt, str)
    if is_chat:
        _check_template(place, tokenizer)
        prompt = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    return _last_of(_opened(place, prompt, is_chat, tokenizer), min(max_length, tokenizer.model_max_length), tokenizer)


def check_tokens(place: str, what: str, tokens: Sequence[int]) -> None:
    """Refuse what a model has nothing to read of: empty or blank texts, unless the tokenizer adds tokens of its own."""
    if not tokens:
        raise ValueError(f"{place} has a {what} of which the tokenizer makes no token. Fill it in, or drop the row.")


def _opened(place: str, prompt: str, is_chat: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text that a completion follows; a chat's template has written the special ones itself."""
    start: list[int] = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    start = start[:-1] if not is_chat and start[-1:] == [tokenizer.eos_token_id] else start
    check_tokens(place, "prompt", start)
    return start


def _last_of(start: list[int], most: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt of so many tokens at most, which loses its beginning but for the first token."""
    surplus = len(start) - most
    if surplus <= 0:
        return start
    first = start[:1] if start[0] == tokenizer.bos_token_id else []
    return first + start[surplus + len(first) :]


def _check_template(place: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(f"{place} holds messages, but the tokenizer has no chat template. Give texts instead.")


def _chat_texts(place: str, prompt: list[Any], completion: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    _check_template(place, tokenizer)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    start = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    whole = str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
    if not whole.startswith(start):
        raise ValueError(
            f"{place}: the tokenizer's chat template writes the prompt in another way when an answer follows, so that "
            "the answer cannot be told apart. Give texts instead of messages."
        )
    return start, whole[len(start) :]
