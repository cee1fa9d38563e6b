"""What PEFT's parametrisation lists become, and the tests that cannot apply."""

from typing import Any

from hyperadapt import HyperAdapterConfig
from hyperadapt.normalization import NORMALIZATIONS

# Networks of the size of the tests' models.
SMALL: dict[str, Any] = {"task_embedding_dim": 8, "hypernetwork_dim": 16, "hypernetwork_depth": 1}
SEVERAL_TASKS: dict[str, Any] = {"tasks": ["one", "two", "three"], "default_task": "two"}
BOTH: dict[str, Any] = {"target_modules": ["lin0", "lin1"]}
# EmbConv1D's convolution has a weight of norm 0.03, so by default an update of at most 0.0065, and gradients as small:
# three steps of SGD at a rate of 0.5 move the heads of A by 9e-5, which the tests' threshold of 1e-4 takes for nothing
# (at a rate of 100, to which they raise it for several of PEFT's methods, by over 1e-2). With these fields every
# parameter moves by at least four times the threshold.
LARGE: dict[str, Any] = {"lora_alpha": 80, "normalization_bound": 10}
# Name of the case, PEFT's test model, and what differs from the defaults.
_CUSTOM: list[tuple[str, str, dict[str, Any]]] = [
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", BOTH),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("Vanilla MLP 7", "MLP", {"target_modules": ".*lin.*", "exclude_modules": ["lin1"], "r": 3}),
    ("Vanilla MLP rows", "MLP", BOTH | {"head": "row"}),
    ("Vanilla MLP pairs", "MLP", BOTH | {"head": "pair"}),
    ("Vanilla MLP ranks", "MLP", BOTH | {"rank_pattern": {"lin1": 2}}),
    ("Vanilla MLP alphas", "MLP", BOTH | {"alpha_pattern": {"lin1": 2}}),
    ("Vanilla MLP tasks", "MLP", BOTH | SEVERAL_TASKS),
    ("Vanilla MLP tasks, unit norm", "MLP", BOTH | SEVERAL_TASKS | {"normalization": "spectral", "head": "row"}),
    ("MLP2", "MLP2", BOTH),
    ("MLP_LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"]}),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]} | LARGE),
    ("Embedding + transformers Conv1D 2", "EmbConv1D", {"target_modules": ["emb"]} | LARGE),
    ("Embedding + transformers Conv1D 3", "EmbConv1D", {"target_modules": ["emb", "conv1d"]} | LARGE),
    (
        "Embedding + transformers Conv1D 4",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "modules_to_save": ["emb"]} | LARGE,
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d bigger", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    # This model's inputs are so large that one step to the default bound would leave no gradient.
    ("Conv2d 3", "Conv2d1x1", {"target_modules": ["conv2d"], "lora_alpha": 0.1}),
    ("Conv2d 4", "Conv2d2", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d tasks", "Conv2d", {"target_modules": ["conv2d", "lin0"], "normalization": "frobenius"} | SEVERAL_TASKS),
    ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d 2", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    *((f"Vanilla MLP {name}", "MLP", BOTH | {"normalization": name}) for name in NORMALIZATIONS if name != "whitening"),
    # With a rank above the two outputs of lin1 it inverts a singular Gram matrix: rounding would be above 1e-6.
    ("Vanilla MLP whitening", "MLP", BOTH | {"normalization": "whitening", "r": 2}),
    # This one has no bound. At the default alpha its update is nearly twice the base weight, and live and merged
    # outputs differ by up to six times the tests' tolerance in float32 (in 200 draws), by 1e-7 of it in float64. At
    # this alpha it is about as large as the default bound lets the others be, and they differ by at most a third.
    (
        "Vanilla MLP whitened A",
        "MLP",
        BOTH | {"normalization": "whitening", "normalization_factors": "A", "lora_alpha": 1},
    ),
]
CUSTOM = [(f"{name} HyperAdapter", model, HyperAdapterConfig, SMALL | changes) for name, model, changes in _CUSTOM]

_RANDOM = SMALL | {"init_weights": False}
SEVERAL = [
    (f"HyperAdapter {name}", "hyperadapter", HyperAdapterConfig, _RANDOM | first, _RANDOM | second)
    for name, first, second in (
        ("Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
        ("Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        ("Overlapping", BOTH, {"target_modules": ["lin0"]}),
        ("Same, other normalisation", BOTH, BOTH | {"normalization": "frobenius", "r": 4}),
        (
            "Same, other tasks",
            BOTH | SEVERAL_TASKS,
            BOTH | {"tasks": ["four", "five"], "default_task": "four", "head": "pair"},
        ),
    )
]
MIXED = [
    (
        "HyperAdapter mixed adapter",
        HyperAdapterConfig(**_RANDOM, target_modules=["lin0"]),
        HyperAdapterConfig(**_RANDOM, target_modules=["lin1"]),
    )
]


def transformers_cases(task_type: str) -> list[tuple[type[HyperAdapterConfig], dict[str, Any]]]:
    """For the tests of transformers models."""
    cases: list[dict[str, Any]] = [
        {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
        {"normalization": "frobenius", "head": "pair"} | SEVERAL_TASKS,
        {"layers_to_transform": [0], "head": "row", "tasks": ["one", "two"], "default_task": "one"},
    ]
    # For these PEFT counts the head as a linear layer and then wants to save it in full, which no method allows.
    if task_type not in ("TOKEN_CLS", "QUESTION_ANS"):
        cases.append({"target_modules": "all-linear"})
    common = SMALL | {"task_type": task_type, "target_modules": None}
    return [(HyperAdapterConfig, common | changes) for changes in cases]


# The convolutions of a residual network, with the buffers of its batch normalisation saved.
_RESNET = SMALL | {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]}
_COMPILED = SMALL | {"task_type": "CAUSAL_LM"}
_QUANTIZED: list[dict[str, Any]] = [
    {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": ["q_proj", "v_proj"], "normalization": "spectral"} | SEVERAL_TASKS,
]
_CLASS = [HyperAdapterConfig]

# By module, its lists and what they become.
LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": _CLASS,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
        "MIXED_ADAPTER_TEST_CASES": MIXED,
    },
    "test_decoder_models": {"ALL_CONFIGS": transformers_cases("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": transformers_cases("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": transformers_cases("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": transformers_cases("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": transformers_cases("TOKEN_CLS"),
        "QA_CONFIGS": transformers_cases("QUESTION_ANS"),
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(HyperAdapterConfig, {}), (HyperAdapterConfig, SEVERAL_TASKS)],
        "LAYER_INDEXING_CONFIG_CLASSES": [(HyperAdapterConfig, {})],
    },
    "test_quantization": {"TEST_CASES": [(HyperAdapterConfig, SMALL | changes) for changes in _QUANTIZED]},
}

# The same for lists without a name: by module and test, the parameters and their values.
UNNAMED: dict[str, dict[str, dict[str, list[Any]]]] = {
    "test_custom_models": {
        "test_multiple_adapters_mixed_modules_to_save": {"config_cls": _CLASS},
        "test_multiple_adapters_mixed_modules_to_save_order_switched": {"config_cls": _CLASS},
        "test_default_target_modules_not_set_raises": {"config_cls": _CLASS},
        "test_default_target_modules_not_set_model_type_set_raises": {"config_cls": _CLASS},
        "test_default_target_modules_list_of_str": {"config_cls": _CLASS},
        "test_default_target_modules_str": {"config_cls": _CLASS},
        "test_adapter_name_makes_no_difference": {
            "config0": [
                HyperAdapterConfig(**_RANDOM, target_modules=["lin0"]),
                HyperAdapterConfig(**_RANDOM, **BOTH, normalization="frobenius", head="pair"),
            ]
        },
    },
    "test_config": {"test_save_pretrained_with_target_modules": {"config_class": _CLASS}},
    "test_low_level_api": {
        "test_inject_adapter_in_model_rejects_shared_state_tuners": {
            "config_cls, config_kwargs": [(HyperAdapterConfig, SMALL)]
        },
        "test_inject_from_state_dict_and_from_config_target_same_layers": {"config": [HyperAdapterConfig(**SMALL)]},
    },
    "test_other": {
        "test_self_targeting_is_ignored": {
            "config_cls, config_kwargs": [
                (HyperAdapterConfig, SMALL | {"target_modules": pattern})
                for pattern in ("l1.*", "l2.*", "(l1|hyperadapter_networks).*")
            ]
        }
    },
    "test_vision_models": {
        "test_model_with_batchnorm_reproducibility": {
            "config": [
                HyperAdapterConfig(**_RESNET),
                HyperAdapterConfig(**_RESNET, **SEVERAL_TASKS, normalization="frobenius"),
            ]
        }
    },
    "test_torch_compile": {
        test: {
            "settings": [
                (HyperAdapterConfig(**_COMPILED), {}),
                (
                    HyperAdapterConfig(
                        **_COMPILED, **SEVERAL_TASKS, target_modules="all-linear", normalization="whitening"
                    ),
                    {},
                ),
            ]
        }
        for test in ("test_causal_lm_training_trainer_compile", "test_causal_lm_training_pytorch_compile")
    },
}
MODULES = sorted(LISTS | UNNAMED)

# Why a test cannot apply, and what the ids of such tests contain.
DESELECTED: dict[str, tuple[str, ...]] = {
    "trains biases, which the config refuses when it is made": (
        "test_adding_multiple_adapters_with_bias_raises",
        "test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
    ),
    "counts trainable tensors, whose number is the same for a network that all layers share": ("_layer_indexing",),
    "mixes adapters with adapter_names=, which is refused: tasks= mixes tasks in a batch": (
        "test_mixed_adapter_batches_mlp",
        "test_mixed_adapter_batches_length_mismatch_raises",
        "test_mixed_adapter_batches_training_mode_raises",
        "test_mixed_adapter_batches_merged_raises",
    ),
    "reads unknown fields with a warning, which are refused: they may change what the others mean": (
        "test_from_pretrained_forward_compatible",
    ),
    "expects the very configuration that is given, of which an adapter has a copy that tells what it adapts": (
        "test_from_pretrained_config_construction",
    ),
    # With less, "test_only_params_are_updated" takes what moves for nothing. In float64 the two are equal.
    "compares to 1e-6 what updates of ten times the base weight round to 1.8e-6, at most, in 40 draws": (
        "test_safe_merge[Embedding + transformers Conv1D 3",
    ),
    "injects without a PeftModel, which PEFT refuses for methods with shared state": ("test_inject_from_state_dict",),
    "loads PEFT's own LoRA config, from the Hub into an empty cache": ("test_from_pretrained_cache_dir",),
}
