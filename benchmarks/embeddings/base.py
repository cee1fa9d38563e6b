"""MiniLM for the embedding study, whose lower layers, which no arm adapts, run once for each text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel

from examples.support.text_tasks import encoder_path

TOKENS = 20
LOWER = 4
"""Layers that are not adapted, of MiniLM's six."""
PADDING = 0

_known: dict[tuple[int, ...], Tensor] = {}


class _KnownLayers(nn.Module):
    """Embeddings and lower layers as one layer, of which each text's output is kept; they run without dropout."""

    def __init__(self, model: BertModel, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a list, so that they are no parts that could be adapted, or put into training mode.
        self.lower = [copy.deepcopy(model.embeddings), *layers]
        self.texts: list[tuple[int, ...]] = []

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Tensor]) -> None:
        """Note the texts of the call that begins."""
        self.texts = [tuple(ids[ids != PADDING].tolist()) for ids in kwargs["input_ids"]]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the lower layers, for the padded texts ``(batch, length, hidden_size)``."""
        return pad_sequence([self._output(text) for text in self.texts], batch_first=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _output(self, text: tuple[int, ...]) -> Tensor:
        if text not in _known:
            embeddings, *layers = self.lower
            hidden = embeddings(torch.tensor([text]))
            for layer in layers:
                hidden = layer(hidden)
            _known[text] = hidden[0]
        return _known[text]


def base() -> SentenceTransformer:
    """MiniLM on the CPU, whose layers above the lower ones are those numbered from 1."""
    model = SentenceTransformer(str(encoder_path()), device="cpu")
    model.max_seq_length = TOKENS
    # Trainers would embed examples for a card that nobody reads.
    model.model_card_data.generate_widget_examples = False
    bert = model.transformers_model
    assert isinstance(bert, BertModel)
    bert.pooler = None
    known = _KnownLayers(bert.eval(), list(bert.encoder.layer[:LOWER]))
    bert.encoder.layer = nn.ModuleList([known, *bert.encoder.layer[LOWER:]])
    # Not the model itself, whose forward is called past its hooks.
    bert.embeddings.register_forward_pre_hook(known.look, with_kwargs=True)
    return model
