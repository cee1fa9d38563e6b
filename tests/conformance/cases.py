"""What PEFT's parametrisation lists become, and the tests that cannot apply."""

from typing import Any

from hyperadapt import HyperAdapterConfig

# Networks of the size of the tests' models.
SMALL: dict[str, Any] = {"task_embedding_dim": 8, "hypernetwork_dim": 16, "hypernetwork_depth": 1}

# Name of the case, PEFT's test model, and what differs from the defaults.
_CUSTOM: list[tuple[str, str, dict[str, Any]]] = [
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("Vanilla MLP rows", "MLP", {"target_modules": ["lin0", "lin1"], "head": "row"}),
    ("Vanilla MLP pairs", "MLP", {"target_modules": ["lin0", "lin1"], "head": "pair"}),
    ("Vanilla MLP ranks", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
    ("Vanilla MLP alphas", "MLP", {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin1": 2}}),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    # This model's gradients are tiny; for other methods PEFT's tests raise the learning rate, which alpha does here.
    ("Embedding + transformers Conv1D 2", "EmbConv1D", {"target_modules": ["emb"], "lora_alpha": 80}),
    ("Embedding + transformers Conv1D 3", "EmbConv1D", {"target_modules": ["emb", "conv1d"], "lora_alpha": 80}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d 2", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    *(
        (f"Vanilla MLP {normalization}", "MLP", {"target_modules": ["lin0", "lin1"], "normalization": normalization})
        for normalization in ("none", "adaptive", "frobenius", "spectral", "sinkhorn")
    ),
    # With more columns than lin1 has outputs, whitening amplifies rounding beyond these tests' tolerance of 1e-6.
    ("Vanilla MLP whitening", "MLP", {"target_modules": ["lin0", "lin1"], "normalization": "whitening", "r": 2}),
]
CUSTOM = [(f"{name} HyperAdapter", model, HyperAdapterConfig, SMALL | changes) for name, model, changes in _CUSTOM]

_RANDOM = SMALL | {"init_weights": False}
SEVERAL = [
    (
        f"HyperAdapter {name}",
        "hyperadapter",
        HyperAdapterConfig,
        _RANDOM | {"target_modules": first},
        _RANDOM | {"target_modules": second},
    )
    for name, first, second in (
        ("Same", ["lin0"], ["lin0"]),
        ("Different", ["lin0"], ["lin1"]),
        ("Overlapping", ["lin0", "lin1"], ["lin0"]),
    )
]


def transformers_cases(task_type: str) -> list[tuple[type[HyperAdapterConfig], dict[str, Any]]]:
    """For the tests of transformers models."""
    common = SMALL | {"task_type": task_type, "target_modules": None}
    return [
        (HyperAdapterConfig, common),
        (HyperAdapterConfig, common | {"normalization": "frobenius", "tasks": ["one", "two"], "head": "pair"}),
    ]


def without_task_type(task_type: str) -> list[tuple[type[HyperAdapterConfig], dict[str, Any]]]:
    """For lists whose tests need nothing but a config."""
    return [(HyperAdapterConfig, {"task_type": task_type, "target_modules": None} | SMALL)]


# By module, the lists and what they become.
REPLACEMENTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [HyperAdapterConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
    },
    "test_decoder_models": {"ALL_CONFIGS": transformers_cases("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": transformers_cases("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": transformers_cases("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": transformers_cases("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": without_task_type("TOKEN_CLS"),
        "QA_CONFIGS": without_task_type("QUESTION_ANS"),
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(HyperAdapterConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(HyperAdapterConfig, {})],
    },
}

# Part of a test's id, and why it cannot apply.
DESELECTED: dict[str, str] = {
    "test_adding_multiple_adapters_with_bias_raises": "bias is refused when the config is made",
    "layer_indexing": "compares the number of parameters, which a network shared by all layers does not change",
    "test_from_pretrained_cache_dir": "downloads from the Hub into an empty cache",
}
