"""The chats of the stability study: the upper layers of SmolLM2-135M, which answer with the name of a class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.stability.settings import Setting
from examples.support.causal_lm import chats, load_base, load_tokenizer
from examples.support.text_tasks import load_task

IGNORED = -100

Batch = dict[str, Tensor]


class ChatRow(NamedTuple):
    """One chat: states of the lower layers `(length, hidden_size)`, the answer's tokens at its end, its task."""

    states: Tensor
    answer: Tensor
    task: int


class ChatScorer(nn.Module):
    """The upper layers of a causal language model; only what stands before an answer's tokens is decoded."""

    def __init__(self, upper: LlamaForCausalLM) -> None:
        super().__init__()
        self.upper = upper

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Logits `(batch, answer, vocabulary)` and loss from states padded on the left, labels likewise."""
        states = self.upper.model(
            inputs_embeds=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state[:, -labels.shape[1] - 1 : -1]
        # As a matrix: a product of three dimensions that are no whole tensor copies the vocabulary for each row.
        logits = self.upper.lm_head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_chats(
    setting: Setting, split: str
) -> tuple[ChatScorer, list[ChatRow], list[ChatRow], Callable[[Sequence[ChatRow], int], Iterator[Batch]]]:
    """The scorer, training rows, rows of a split, and what makes batches of rows."""
    model, tokenizer = load_base(torch.bfloat16), load_tokenizer()
    # As in ``split_encoder``.
    model.set_attn_implementation("eager")
    lower = copy.deepcopy(model.model)
    lower.layers, lower.norm = lower.layers[: setting.frozen_layers], nn.Identity()
    model.model.layers = model.model.layers[setting.frozen_layers :]
    train, evaluation = (
        [
            ChatRow(states, ids[start:], task)
            for task, name in enumerate(setting.tasks)
            for ids, start in _tokens(name, part, count, setting.max_length, tokenizer)
            for states in [_states(lower, ids)]
        ]
        for part, count in (("train", setting.train_rows), (split, setting.rows))
    )
    return ChatScorer(model), train, evaluation, in_batches


def in_batches(rows: Sequence[ChatRow], size: int) -> Iterator[Batch]:
    """Pad rows to batches with ``tasks``, on the left, in order."""
    for start in range(0, len(rows), size):
        members = rows[start : start + size]
        lengths = torch.tensor([len(row.states) for row in members])
        longest = int(lengths.max())
        yield {
            "input_ids": torch.stack([pad(row.states, (0, 0, longest - len(row.states), 0)) for row in members]),
            "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long(),
            "labels": pad_sequence(
                [row.answer for row in members], batch_first=True, padding_value=IGNORED, padding_side="left"
            ),
            "tasks": torch.tensor([row.task for row in members]),
        }


def _tokens(name: str, split: str, count: int, max_tokens: int, tokenizer: object) -> Iterator[tuple[Tensor, int]]:
    """Token ids of each chat of a task, and where the answer begins; the token that ends it belongs to it."""
    for row in chats(load_task(name), split, tokenizer, max_rows=count, max_tokens=max_tokens):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        yield torch.tensor([*prompt, *answer, tokenizer.eos_token_id]), len(prompt)


@torch.no_grad()
def _states(lower: nn.Module, ids: Tensor) -> Tensor:
    return lower(ids[None], use_cache=False).last_hidden_state[0]
