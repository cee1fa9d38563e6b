"""Text encoders: from descriptions of tasks to vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import FUNCTION, encoder_name

# Encoders run in half precision on some devices, where a vector may turn by about the square of a rounding error.
SAME_DIRECTION = 0.999


def with_text_vectors(config: HyperAdapterConfig) -> tuple[HyperAdapterConfig, Tensor | None]:
    """A configuration with its encoder pinned (name, revision, dimension), and the vectors of its descriptions.

    None where no task has text, or the dimension is pinned already: then the vectors come from the adapter's file. Else
    float32 of shape ``(descriptions, text_embedding_dim)``.
    """
    texts = [text for descriptions in config.embedded_descriptions for text in descriptions]
    if not texts or config.text_embedding_dim is not None:
        return config, None
    assert config.text_encoder is not None
    if config.is_from_file:
        raise ValueError(
            f"The configuration comes from a file, which names text_encoder={shown(config.text_encoder)} but holds no "
            "vectors of its descriptions. A model that a file names is not loaded unasked: pass "
            "config.replaced(text_encoder=...) with the encoder."
        )
    vectors, revision = encode_texts(config.text_encoder, texts, config.text_encoder_revision)
    pinned = config.replaced(
        text_encoder=encoder_name(config.text_encoder),
        text_encoder_revision=revision,
        text_embedding_dim=vectors.shape[1],
    )
    return pinned, vectors


def encode_like(
    config: HyperAdapterConfig,
    texts: Sequence[str],
    known_vector: Tensor,
    text_encoder: str | Callable[[list[str]], Tensor] | None = None,
) -> Tensor:
    """Vectors ``(texts, text_embedding_dim)``, float32, of further descriptions, by the encoder of the adapter.

    ``known_vector`` is what that gave for the adapter's first description; another encoder is refused.
    """
    encoder = config.text_encoder if text_encoder is None else text_encoder
    assert encoder is not None
    if isinstance(encoder, str) and encoder.startswith(FUNCTION):
        raise ValueError(
            f"The adapter's descriptions were encoded by the function {encoder.removeprefix(FUNCTION)!r}, which a file "
            "cannot hold. Pass it as text_encoder=."
        )
    [known] = [descriptions for descriptions in config.embedded_descriptions if descriptions][:1]
    revision = config.text_encoder_revision if encoder == config.text_encoder else None
    vectors, _ = encode_texts(encoder, [known[0], *texts], revision)
    if vectors.shape[1] != config.text_embedding_dim:
        raise ValueError(
            f"text_encoder={shown(encoder)} gives vectors of size {vectors.shape[1]}, but the adapter was made with "
            f"{config.text_embedding_dim}, by {config.text_encoder!r}. Pass that encoder."
        )
    similarity = float(cosine_similarity(vectors[0], known_vector.to(vectors), dim=0))
    if similarity < SAME_DIRECTION:
        raise ValueError(
            f"text_encoder={shown(encoder)} is not the encoder that the adapter was made with: its vector for the "
            f"description {shown(known[0])} has a cosine of {similarity:.3f} with the one in the adapter, by "
            f"{config.text_encoder!r}. Pass that encoder, in revision {config.text_encoder_revision!r}."
        )
    return vectors[1:]


def encode_texts(
    encoder: str | Callable[[list[str]], Any], texts: Sequence[str], revision: str | None = None
) -> tuple[Tensor, str | None]:
    """One finite vector of each text, ``(texts, dim)``, float32, on the CPU, and the revision that was used.

    The encoder is a name or folder of a sentence-transformers model, or a function from a list of texts to a tensor.
    """
    if callable(encoder):
        vectors, found = encoder(list(texts)), None
    else:
        model = _sentence_transformer(encoder, revision)
        vectors = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        found = getattr(getattr(getattr(model[0], "auto_model", None), "config", None), "_commit_hash", None)
    name = shown(encoder_name(encoder))
    try:
        vectors = torch.as_tensor(vectors).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"text_encoder={name} gave {type(vectors).__name__}, which is no tensor. It must take a list of texts and "
            "return a tensor of shape (texts, dim)."
        ) from error
    if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise ValueError(
            f"text_encoder={name} gave a tensor of shape {tuple(vectors.shape)} for {len(texts)} texts. It must return "
            "one of shape (texts, dim)."
        )
    wrong = ~vectors.isfinite().all(1) | (vectors == 0).all(1)
    if wrong.any():
        text = texts[int(wrong.nonzero()[0])]
        raise ValueError(
            f"text_encoder={name} gave a vector for {shown(text)} that is zero or not finite. Check the encoder, or "
            "write another description."
        )
    return vectors, found


def _sentence_transformer(name: str, revision: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModuleNotFoundError(
            f"text_encoder={name!r} names a sentence-transformers model, and sentence-transformers is not installed. "
            'Install it with pip install "hyperadapt[text]", or pass a function.'
        ) from error
    try:
        return SentenceTransformer(name, revision=revision)
    except Exception as error:
        raise ValueError(
            f"text_encoder={name!r} could not be loaded (revision {revision!r}): {error} Name a sentence-transformers "
            "model on the Hub or a folder that holds one."
        ) from error
