"""Formats of exports: what servers demand of a LoRA folder, stated in our own words, and what a format refuses.

Each rule names the file that it comes from. A rule returns whether a folder follows it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from hyperadapt import export_lora, export_loras, generate_lora
from hyperadapt.loras.file_formats import FORMATS, is_whole
from tests.support.helpers import TASK_TYPES, adapted_model, adapter_config, base_model, letters


@dataclass
class Folder:
    """A folder of a LoRA, and the base model that a server has loaded."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base: nn.Module

    @property
    def modules(self) -> set[str]:
        """Paths of the modules with factors."""
        names = {name.removeprefix("base_model.model.") for name in self.tensors if ".lora_" in name}
        return {name.partition(".lora_")[0] for name in names}


def folder_of(path: Path, base: nn.Module) -> Folder:
    config = json.loads((path / "adapter_config.json").read_text())
    return Folder(path, config, load_file(path / "adapter_model.safetensors"), base)


# vLLM 0.33.0, vllm/lora/peft_helper.py: PEFTHelper.from_dict, __post_init__, _validate_features and validate_legal.
def vllm_config(folder: Folder) -> bool:
    config = folder.config
    features = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    return (
        {"r", "lora_alpha", "target_modules"} <= config.keys()
        and config["r"] > 0
        and config["bias"] == "none"
        and isinstance(config["init_lora_weights"], bool)
        and not any(config.get(name) for name in features)
        and set(config["modules_to_save"] or ()) <= {"classifier", "score"}
    )


# vLLM 0.33.0, vllm/config/lora.py: MaxLoRARanks, what max_lora_rank can be; a LoRA of the same rank wastes no memory.
def vllm_rank(folder: Folder) -> bool:
    ranks = {folder.config["r"], *(folder.config["rank_pattern"] or {}).values()}
    return ranks <= {1, 8, 16, 32, 64, 128, 256, 320, 512}


# vLLM 0.33.0, vllm/lora/utils.py: parse_fine_tuned_lora_name raises for any other name.
def vllm_names(folder: Folder) -> bool:
    pattern = r".+\.lora_[AB]\.weight|.+\.lora_embedding_[AB]|.+\.(score|classifier)\.(weight|bias)"
    return all(re.fullmatch(pattern, name) for name in folder.tensors)


# vLLM 0.33.0, vllm/lora/lora_model.py: check_unexpected_modules compares the last part of a module's path with those of
# the model's linear layers, which vllm/lora/utils.py: get_supported_lora_modules lists.
def vllm_modules(folder: Folder) -> bool:
    linear = {name for name, one in folder.base.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    return {path.rpartition(".")[2] for path in folder.modules} <= {path.rpartition(".")[2] for path in linear}


# SGLang 0.5.23, python/sglang/srt/lora/lora.py: LoRAAdapter.__init__ asserts the type; lora_config.py: LoRAConfig
# reads the fields; lora_manager.py: validate_new_adapter refuses DoRA and tokens that are added by a file.
def sglang_config(folder: Folder) -> bool:
    return (
        folder.config["peft_type"].lower() == "lora"
        and {"r", "lora_alpha", "target_modules"} <= folder.config.keys()
        and not folder.config["use_dora"]
        and not (folder.path / "added_tokens.json").exists()
    )


# SGLang 0.5.23, python/sglang/srt/lora/lora_manager.py: init_lora_shapes infers modules from a list only;
# mem_pool.py: load_lora_weight_to_buffer finds the last parts of its names in those of the weights.
def sglang_target_modules(folder: Folder) -> bool:
    targets = folder.config["target_modules"]
    if not isinstance(targets, list):
        return False
    endings = {name.split(".")[-1] for name in targets}
    return all(any(ending in path for ending in endings) for path in folder.modules)


# SGLang 0.5.23, python/sglang/srt/lora/mem_pool.py: load_lora_weight_to_buffer asserts that every factor has rank r;
# lora.py: LoRAAdapter scales all of them by lora_alpha / r, and reads no patterns.
def sglang_uniform_rank(folder: Folder) -> bool:
    r = folder.config["r"]
    sizes = {
        tensor.shape["lora_B" in name] for name, tensor in folder.tensors.items() if re.search(r"lora_[AB]\.", name)
    }
    return sizes == {r} and not folder.config["rank_pattern"] and not folder.config["alpha_pattern"]


# SGLang 0.5.23, python/sglang/srt/lora/lora.py: normalize_qkv_proj and normalize_gate_up_proj stack what the model
# has fused: q_proj takes v_proj along, k_proj only if it is there; up_proj needs gate_proj.
def sglang_stacks(folder: Folder) -> bool:
    together = (("q_proj", "v_proj"), ("v_proj", "q_proj"), ("k_proj", "q_proj"), ("up_proj", "gate_proj"))
    return all(
        path.removesuffix(one) + other in folder.modules
        for one, other in together
        for path in folder.modules
        if path.endswith(f".{one}")
    )


# SGLang 0.5.23, python/sglang/srt/lora/lora.py: _process_weight drops what is outside of numbered "layers" without a
# word (layers/utils/common.py: get_layer_id), embeddings aside. GPT-2 calls them "h": SGLang serves no LoRAs of it.
def sglang_layers(folder: Folder) -> bool:
    return all(re.search(r"layers\.\d+\.", name) for name in folder.tensors)


# llama.cpp of llama-cpp-python 0.3.36, convert_lora_to_gguf.py: get_tensors ends the program at other names than these
# and norms; LoraTorchTensor.__init__ asserts shapes, and that A and B are of one kind.
def llama_cpp_tensors(folder: Folder) -> bool:
    if not all(re.search(r"\.lora_[AB]\.weight$", name) for name in folder.tensors):
        return False
    pairs = [
        [folder.tensors.get(f"base_model.model.{path}.lora_{one}.weight") for one in "AB"] for path in folder.modules
    ]
    return all(
        lora_A is not None
        and lora_B is not None
        and lora_A.ndim == lora_B.ndim == 2
        and lora_A.shape[0] == lora_B.shape[1]
        and lora_A.dtype == lora_B.dtype
        for lora_A, lora_B in pairs
    )


# llama.cpp of llama-cpp-python 0.3.36, src/llama-adapter.h: get_scale divides the one lora_alpha that
# convert_lora_to_gguf.py found in adapter_config.json by the rank of each B.
def llama_cpp_scale(folder: Folder) -> bool:
    alpha = folder.config["lora_alpha"]
    return all(tensor.shape[1] == alpha for name, tensor in folder.tensors.items() if "lora_B" in name)


# llama.cpp of llama-cpp-python 0.3.36, conversion/base.py: load_hparams reads config.json with AutoConfig, and
# get_model_architecture needs a name; dequant_model knows no bitsandbytes.
def llama_cpp_base(folder: Folder) -> bool:
    if not (folder.path / "config.json").exists():
        return False
    config = AutoConfig.from_pretrained(folder.path)
    return config.architectures == [type(folder.base).__name__] and not hasattr(config, "quantization_config")


VLLM = (vllm_config, vllm_rank, vllm_names, vllm_modules)
SGLANG = (sglang_config, sglang_target_modules, sglang_uniform_rank, sglang_stacks)
LLAMA_CPP = (llama_cpp_tensors, llama_cpp_scale, llama_cpp_base)
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"llama": {}, "gpt2": {}},
    "patterns": {
        "llama": {"r": 3, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"v_proj": 2}},
        "gpt2": {"r": 3, "rank_pattern": {"c_fc": 12}},
    },
    "full names": {
        "llama": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        "gpt2": {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    },
}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(
    ("name", "format", "rules"),
    [
        ("llama", "peft", (*VLLM, *SGLANG, sglang_layers)),
        ("gpt2", "peft", (*VLLM, *SGLANG)),
        ("llama", "gguf-ready", (*VLLM, *SGLANG, sglang_layers, *LLAMA_CPP)),
    ],
)
def test_exports_are_what_servers_take(
    tmp_path: Path, name: str, format: str, rules: tuple[Callable[[Folder], bool], ...], changes: str
) -> None:
    model = adapted_model(name, task_type=TASK_TYPES[name], **CHANGES[changes][name])
    export_lora(model, "beta", tmp_path, format=format)
    folder = folder_of(tmp_path, base_model(name))
    assert len(folder.modules) == len(model.base_model.router.network("default").positions)
    for rule in rules:
        assert rule(folder), rule.__name__


def test_a_classifier_is_what_vllm_takes(tmp_path: Path) -> None:
    export_lora(adapted_model("bert", task_type="SEQ_CLS"), "beta", tmp_path)
    folder = folder_of(tmp_path, base_model("bert"))
    assert folder.config["modules_to_save"] == ["classifier", "score"]
    assert "base_model.model.classifier.weight" in folder.tensors
    for rule in VLLM:
        assert rule(folder), rule.__name__


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return adapted_model("llama", task_type="CAUSAL_LM")


@pytest.mark.parametrize("format", ["gguf", None])
def test_an_unknown_format_is_refused(tmp_path: Path, llama: nn.Module, format: Any) -> None:
    texts = adapted_model("llama", tasks={"alpha": "one"}, task_embedding="text", text_encoder=letters)
    message = f"format={format!r} is unknown. Choose one of 'peft', 'gguf-ready', 'mlx', 'diffusers'."
    for call in (
        lambda: export_lora(llama, "beta", tmp_path / "new", format=format),
        lambda: export_loras(llama, tmp_path / "new", format=format),
        lambda: generate_lora(texts, "two", tmp_path / "new", text_encoder=letters, format=format),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert list(tmp_path.iterdir()) == []


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
HEAD = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("gguf-ready", "gpt2", {}, "(not Conv1D, which llama.cpp's converter transposes), but the adapter also adapts "),
    ("gguf-ready", "llama", EMBEDDING, "takes linear layers (not Conv1D"),
    ("gguf-ready", "llama", EMBEDDING, "but the adapter also adapts ['model.embed_tokens']. Export with format='peft'"),
    ("gguf-ready", "llama", HEAD, "no place for modules trained in full, but modules_to_save has ['lm_head']."),
    (
        "gguf-ready",
        "bert",
        {"task_type": "SEQ_CLS"},
        "modules trained in full, but modules_to_save has ['classifier'].",
    ),
    (
        "mlx",
        "gpt2",
        {},
        "takes linear layers in model.layers, but the adapter also adapts ['transformer.h.0.attn.c_attn'",
    ),
    (
        "mlx",
        "llama",
        EMBEDDING,
        "takes linear layers in model.layers, but the adapter also adapts ['model.embed_tokens'].",
    ),
    ("mlx", "llama", {"target_modules": ["q_proj", "lm_head"]}, "but the adapter also adapts ['lm_head']."),
    ("mlx", "llama", HEAD, "no place for modules trained in full, but modules_to_save has ['lm_head']."),
    ("diffusers", "llama", {}, "is for models of diffusers, but the base model is a LlamaForCausalLM. Choose another"),
]


# PEFT says so whenever it saves an adapted embedding.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(("format", "name", "changes", "message"), REFUSED)
def test_what_a_format_has_no_place_for_is_refused(
    tmp_path: Path, format: str, name: str, changes: dict[str, Any], message: str
) -> None:
    model = adapted_model(name, **changes)
    for call in (export_lora, lambda *arguments, **options: export_loras(*arguments[::2], **options)):
        with pytest.raises(ValueError, match=f"^format='{format}' .*{re.escape(message)}"):
            call(model, "beta", tmp_path / "new", format=format)
    assert list(tmp_path.iterdir()) == []


def test_only_models_of_transformers_are_ready_for_llama_cpp(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), adapter_config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"models of transformers, which .* but the base model is a Sequential\."):
        export_lora(model, "beta", tmp_path / "new", format="gguf-ready")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "files"), [("peft", 2), ("gguf-ready", 3), ("mlx", 2)])
def test_a_lora_is_whole_with_all_its_files(tmp_path: Path, llama: nn.Module, format: str, files: int) -> None:
    export_lora(llama, "beta", tmp_path, format=format)
    needed = [path for path in tmp_path.iterdir() if path.name != "README.md"]
    assert is_whole(tmp_path, format)
    assert len(needed) == files
    for path in needed:
        content = path.read_bytes()
        path.unlink()
        assert not is_whole(tmp_path, format)
        path.write_bytes(content)


def test_the_formats_are_those_of_the_documentation() -> None:
    assert all(f'``"{format}"``' in export_lora.__doc__ for format in FORMATS)
