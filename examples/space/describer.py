"""What turns a description into the vector that the adapter reads: MiniLM itself, frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from examples.support.encoder import load_base, load_tokenizer


class Describer:
    """A text encoder, as `text_encoder=` takes one."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer()
        self._model = load_base(2, seed=0)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1, ``(texts, 384)``, each computed alone, so that no text changes another's."""
        batches = [self._tokenizer(text, return_tensors="pt", truncation=True) for text in texts]
        return normalize(torch.cat([self._model.embed(**batch) for batch in batches]), dim=-1)
