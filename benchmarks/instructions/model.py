"""SmolLM2-135M for the instruction study: its lower layers are frozen and computed apart, only answers are decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

IGNORED = -100

Batch = dict[str, Any]


class Tokens(NamedTuple):
    """Token ids of a prompt and its answer, with what ends it, and where the answer begins."""

    ids: list[int]
    start: int


class Answerer(LlamaForCausalLM):
    """The upper layers of a causal language model; their input are the states of the lower ones."""

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **others: Any
    ) -> CausalLMOutput:
        """Logits ``(tokens, vocabulary)`` of all tokens of answers, row by row, and their mean loss."""
        hidden = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        if labels is None:
            return CausalLMOutput()
        targets = labels[:, 1:]
        logits = self.lm_head(hidden[:, :-1][targets != IGNORED])
        return CausalLMOutput(loss=cross_entropy(logits.float(), targets[targets != IGNORED]), logits=logits)


class LowerLayers(nn.Module):
    """The layers that stay frozen."""

    def __init__(self, model: LlamaForCausalLM, count: int) -> None:
        super().__init__()
        self.model = copy.copy(model.model)
        # What it holds is replaced below, and the whole model keeps its own.
        self.model._modules = dict(model.model._modules)
        self.model.layers, self.model.norm = model.model.layers[:count], nn.Identity()

    @torch.no_grad()
    def forward(self, rows: Sequence[Tokens]) -> list[Tensor]:
        """States ``(length, hidden_size)`` of each row."""
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        lengths = [len(row.ids) for row in rows]
        states = self.model(ids, attention_mask=_mask(lengths), use_cache=False).last_hidden_state
        return [state[:length].clone() for state, length in zip(states, lengths, strict=True)]


def split(model: LlamaForCausalLM, frozen_layers: int) -> tuple[LowerLayers, Answerer]:
    """The lower layers of a model, and one that has the upper ones alone and shares its weights."""
    # On a CPU the backward of fused attention in bfloat16 takes longer than all else together.
    model.set_attn_implementation("eager")
    lower = LowerLayers(model, frozen_layers)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = model.config.num_hidden_layers - frozen_layers
    with torch.device("meta"):
        upper = Answerer(config).to(model.dtype)
    upper.model.embed_tokens, upper.lm_head, upper.model.norm = (
        model.model.embed_tokens,
        model.lm_head,
        model.model.norm,
    )
    upper.model.layers, upper.model.rotary_emb = model.model.layers[frozen_layers:], model.model.rotary_emb
    return lower, upper.eval().requires_grad_(False)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer: str,
    instruction: str | None = None,
    ends_line: bool = False,
) -> Tokens:
    """A row with its answer, which ends its line or the turn; with the instruction before it, if one is given."""
    end = tokenizer("\n")["input_ids"] if ends_line else [tokenizer.eos_token_id]
    told = "" if instruction is None else f"{instruction}\n"
    prompt = prompt_of(tokenizer, f"{told}{text} ->").ids
    return Tokens([*prompt, *tokenizer(f" {answer}")["input_ids"], *end], len(prompt))


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """A text's tokens, all of them a prompt."""
    # Models attend to the first token where there is nothing to attend to, so it should be no word of the text.
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    return Tokens(ids, len(ids))


def padded(states: Sequence[Tensor], rows: Sequence[Tokens]) -> Batch:
    """Pad rows and their states on the right to a batch."""
    labels = [torch.tensor([IGNORED] * row.start + row.ids[row.start :]) for row in rows]
    return {
        "inputs_embeds": pad_sequence(list(states), batch_first=True),
        "attention_mask": _mask([len(row.ids) for row in rows]),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
