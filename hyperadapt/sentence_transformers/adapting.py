"""Giving an embedding model a hyperadapter."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from hyperadapt.config.checks import check_type
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.sentence_transformers.encoding import adopt
from hyperadapt.sentence_transformers.transformer import HyperAdapterTransformer


def add_hyperadapter(model: SentenceTransformer, config: HyperAdapterConfig) -> SentenceTransformer:
    """Give an embedding model a hyperadapter, in place, as ``model.add_adapter`` does with other adapters.

    Then ``model.encode(texts, tasks=...)`` takes a task for all texts, or one for each, and ``save_pretrained`` writes
    a folder that ``SentenceTransformer`` loads where hyperadapt is imported.

    Args:
        model: A ``SentenceTransformer`` with a ``Transformer`` module first.
        config: The configuration; its `tasks` are what texts are embedded for. Those called ``"query"`` and
            ``"document"`` are used by ``encode_query`` and ``encode_document``.

    Returns:
        The same model. What ``get_peft_model`` gives is its ``transformers_model``.

    Raises:
        TypeError: If the model, its first module or the configuration is of another kind.
        ValueError: If the model was adapted before, or calls other methods than ``forward``.
    """
    if not isinstance(model, SentenceTransformer):
        raise TypeError(f"model is a {type(model).__name__}, but must be a SentenceTransformer.")
    module: Any = model[0]
    if isinstance(module, HyperAdapterTransformer):
        raise ValueError(
            "The model has a hyperadapter. Add tasks to it with model.transformers_model.add_task, or load the base "
            "model anew."
        )
    if type(module) is not Transformer:
        raise TypeError(
            f"The model's first module is a {type(module).__name__}, but must be a Transformer of "
            "sentence-transformers, of the torch backend: that is what tasks are given to."
        )
    methods = {name: entry["method"] for name, entry in module.modality_config.items()}
    if set(methods.values()) != {"forward"} or module.backend != "torch":
        raise ValueError(
            f"The model calls {methods} of the backend {module.backend!r}, but only forward of torch takes tasks. Load "
            "a model whose modalities are embedded by forward, with backend='torch'."
        )
    check_type("config", config, HyperAdapterConfig, "a HyperAdapterConfig", optional=False)
    adapted = HyperAdapterTransformer.__new__(HyperAdapterTransformer)
    vars(adapted).update(vars(module))
    adapted._modules = dict(module._modules)
    adapted.adapt(get_peft_model(module.model, config))
    model[0] = adapted
    # That of the base model, which says how to use the base model.
    model._model_card_text = None
    adopt(model)
    return model
