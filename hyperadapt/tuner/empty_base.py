"""What an adapter was made for, found in the configuration of its base model: for files that do not tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.tuner.model import HyperAdapterModel

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def made_for(config: HyperAdapterConfig, others: Mapping[str, Tensor]) -> HyperAdapterConfig:
    """The configuration with what its adapter was made for, from the base model's config.json; no weights are read.

    The number of labels is that of a classifier among the other tensors of the file, by their names.
    """
    kind, path = AUTO_CLASSES.get(config.task_type or ""), config.base_model_name_or_path
    if kind is None or not path:
        raise ValueError(
            f"The adapter was saved without its positions, and task_type={config.task_type!r} with "
            f"base_model_name_or_path={path!r} does not tell how its base model is made. Load it in Python with "
            "PeftModel.from_pretrained, and save it again with save_pretrained."
        )
    safely: dict[str, Any] = {"trust_remote_code": False}
    options: dict[str, Any] = {"revision": config.revision or "main"}
    rows = [one.shape[0] for name, one in others.items() if name.endswith(".weight")]
    if config.task_type in CLASSIFIERS and rows:
        options["num_labels"] = rows[-1]
    base_config = transformers.AutoConfig.from_pretrained(path, **safely, **options)
    dtype = {} if base_config.dtype is None else {"dtype": base_config.dtype}
    # Not init_empty_weights, which would take the weights of models that other threads are making, too.
    with torch.device("meta"):
        base_model = getattr(transformers, kind).from_config(base_config, **safely, **dtype)
        tuner = HyperAdapterModel(base_model, config, "default")
    made: Any = tuner.peft_config["default"]
    assert isinstance(made, HyperAdapterConfig)
    return made
