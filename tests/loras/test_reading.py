"""LoRA folders as updates: against PEFT's own dense updates, and everything that is no plain LoRA."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.hypernetwork.positions import Position
from hyperadapt.loras.reading import read_lora
from tests.support.helpers import adapted_model, base_model
from tests.support.lora_library import lora_folder
from tests.support.tolerances import FLOAT32_FORMULA

Q_PROJ = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q_PROJ}.lora_A.weight"


def positions_of(name: str, **changes: Any) -> dict[str, Position]:
    network = adapted_model(name, **changes).base_model.router.network("default")
    return {position.name: position for position in network.positions}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path) | changes
    save_file({key: value for key, value in state.items() if value is not None}, path)


def check_against_peft(folder: Path, name: str, positions: dict[str, Position]) -> None:
    """Compare with the dense updates of a model that PEFT loads."""
    lora = read_lora("alpha", folder, positions)
    peft_model = PeftModel.from_pretrained(base_model(name), folder)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert layers.keys() == lora.updates.keys()
    for path, factors in lora.updates.items():
        dense = layers[path].get_delta_weight("default").detach()
        ours = factors.delta_weight()
        # PEFT gives the update in the shape of the base weight.
        ours = ours.T if ours.shape != dense.shape and dense.ndim == 2 else ours.reshape(dense.shape)
        assert_close(ours, dense, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    state = load_file(folder / "adapter_model.safetensors")
    assert lora.parameters == sum(value.numel() for value in state.values())
    assert lora.num_bytes == sum(value.nbytes for value in state.values())


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"q_proj": 7, "v_proj": 1}},
        {"r": 2, "rank_pattern": {"q_proj": 3}, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
        {"r": 2, "target_modules": ["embed_tokens", "k_proj"], "lora_alpha": 3},
    ],
)
def test_updates_are_those_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    lora_folder(tmp_path, **config)
    modules = [*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "embed_tokens"]
    check_against_peft(tmp_path, "llama", positions_of("llama", target_modules=modules))


@pytest.mark.parametrize(("name", "modules"), [("gpt2", ["c_attn", "c_fc"]), ("vit", ["projection", "q_proj"])])
def test_updates_of_transposed_layers_and_convolutions_are_those_of_peft(
    tmp_path: Path, name: str, modules: list[str]
) -> None:
    lora_folder(tmp_path, name, r=3, target_modules=modules, fan_in_fan_out=name == "gpt2")
    check_against_peft(tmp_path, name, positions_of(name, target_modules=modules))


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    lora_folder(tmp_path, r=2)
    # Copies: some releases map the file, which is written to.
    half = {key: value.bfloat16() for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    edit_weights(tmp_path, half)
    lora = read_lora("alpha", tmp_path, positions_of("llama"))
    assert torch.equal(lora.updates[Q_PROJ].lora_A, half[KEY])
    assert lora.num_bytes == 2 * lora.parameters


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "has use_dora=True, which does more than to add"),
    ({"use_qalora": True}, "has use_qalora=True, which does more"),
    ({"lora_bias": True}, "has lora_bias=True, which does more"),
    (
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        "has alora_invocation_tokens=[1, 2], which does more",
    ),
    ({"layer_replication": [[0, 2]]}, "has layer_replication=[[0, 2]], which does more"),
    ({"trainable_token_indices": [3]}, "has trainable_token_indices=[3], which does more"),
    ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4', which changes the base weights"),
    ({"init_lora_weights": "olora"}, "has init_lora_weights='olora', which changes the base weights"),
    ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], modules trained in full, one for each LoRA"),
    ({"bias": "all"}, "has bias='all', but a hyperadapter generates no biases. Train it with bias='none'."),
    ({"peft_type": "LOHA"}, "is of peft_type 'LOHA'; only 'LORA' can be distilled."),
    ({"peft_type": 3}, "is of peft_type 3; only 'LORA' can be distilled."),
    ({"r": 5}, "has factors of shapes (2, 48) and (32, 2) for 'model.layers.0.mlp.down_proj', where its rank of 5"),
    ({"r": 0}, "has an adapter_config.json that cannot be used: r=0 must be at least 1."),
    ({"lora_alpha": "8"}, "has an adapter_config.json that cannot be used: lora_alpha='8' must be a number"),
    ({"rank_pattern": ["q_proj"]}, "has an adapter_config.json that cannot be used: rank_pattern=['q_proj'] must be"),
    ({"layers_pattern": "h"}, "has an adapter_config.json that cannot be used: When `layers_pattern` is specified"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=[message[:40] for _, message in UNSUPPORTED])
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    lora_folder(tmp_path, r=2)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f"The LoRA of task 'alpha' in {str(tmp_path)!r} {message}")):
        read_lora("alpha", tmp_path, positions_of("llama"))


WEIGHTS: list[tuple[dict[str, Tensor | None], str]] = [
    ({KEY: None}, f"has no factor A for '{Q_PROJ}'. The file is damaged"),
    ({KEY: torch.zeros(2, 31)}, "has factors of shapes (2, 31) and (32, 2)"),
    ({KEY: torch.full((2, 32), torch.nan)}, f"holds '{KEY}' with weights that are not finite numbers (torch.float32)"),
    ({KEY: torch.zeros(2, 32, dtype=torch.int8)}, "with weights that are not finite numbers (torch.int8)"),
    (
        {f"base_model.model.{Q_PROJ}.lora_magnitude_vector": torch.ones(32)},
        f"holds 'base_model.model.{Q_PROJ}.lora_magnitude_vector' besides its factors",
    ),
    ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "holds 'base_model.model.lm_head.weight' besides"),
]


@pytest.mark.parametrize(("changes", "message"), WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    lora_folder(tmp_path, r=2)
    edit_weights(tmp_path, changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_lora("alpha", tmp_path, positions_of("llama"))


def test_positions_that_the_hyperadapter_lacks_are_named(tmp_path: Path) -> None:
    lora_folder(tmp_path, r=2)
    positions = positions_of("llama", target_modules=["q_proj", "k_proj"])
    shown = "'model.layers.0.mlp.down_proj', 'model.layers.0.mlp.gate_proj', "
    message = f"adapts {shown}"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.* and 5 more, which this hyperadapter does not."):
        read_lora("alpha", tmp_path, positions)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(tmp_path: Path, file: str) -> None:
    lora_folder(tmp_path, r=2)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"task 'alpha' in .* has no {re.escape(file)}. Pass a folder"):
        read_lora("alpha", tmp_path, {})
    with pytest.raises(FileNotFoundError, match=re.escape("in 'user/name' has no adapter_config.json")):
        read_lora("alpha", "user/name", {})


def test_damaged_files_are_named(tmp_path: Path) -> None:
    lora_folder(tmp_path, r=2)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(ValueError, match=r"has a damaged adapter_model\.safetensors \(.*\)\. Get it again\."):
        read_lora("alpha", tmp_path, {})
    for text in ("{", "[]", "{}", "\x00"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"has an adapter_config\.json that is no configuration of PEFT"):
            read_lora("alpha", tmp_path, {})


def test_initialisations_that_leave_the_base_alone_are_plain(tmp_path: Path) -> None:
    lora_folder(tmp_path, r=2)
    edit_config(tmp_path, init_lora_weights="gaussian")
    assert isinstance(LoraConfig.from_pretrained(tmp_path), LoraConfig)
    assert len(read_lora("alpha", tmp_path, positions_of("llama")).updates) == 14
