"""LoRAs made without the base model: bit for bit those of the live model, from files that are checked."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hyperadapt import LoraGenerator, export_lora
from hyperadapt.loras.file_formats import FORMATS
from tests.support.helpers import TASK_TYPES, TASKS, adapted_model, adapter_config, letters, make_active


class Net(nn.Module):
    """A layer of each kind that is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=2)
        self.layers = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1) for _ in range(2))
        self.plane, self.volume = nn.Conv2d(1, 4, (2, 3)), nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(4, 3)


def net(**changes: Any) -> PeftModel:
    modules = ["words", "layers.0", "layers.1", "plane", "volume", "head"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_active(get_peft_model(Net(), adapter_config(target_modules=modules, **changes)))


def saved(model: PeftModel, folder: Path) -> LoraGenerator:
    model.save_pretrained(str(folder))
    return LoraGenerator.from_pretrained(folder)


def outcome(write: Callable[[Path], None], folder: Path) -> dict[str, bytes] | str:
    """The files that are written to a new folder, or the error."""
    try:
        write(folder / "out")
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    except ValueError as error:
        return str(error)
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"task_type": kind}) for name, kind in TASK_TYPES.items()},
    "patterns": ("llama", {"r": 3, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"v_proj": 2}}),
    "one layer": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "patches": ("vit", {"target_modules": ["projection", "query"]}),
    "sinkhorn": ("llama", {"normalization": "sinkhorn", "head": "row"}),
    "polar": ("gpt2", {"normalization": "polar", "head": "pair"}),
    "adaptive": ("bert", {"normalization": "adaptive"}),
    "text": ("llama", {"tasks": dict.fromkeys(TASKS, "some text"), "task_embedding": "both", "text_encoder": letters}),
}


# PEFT says so whenever it saves an adapted embedding.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", [*CASES, "net"])
def test_a_lora_is_that_of_the_live_model(tmp_path: Path, case: str) -> None:
    name, changes = CASES.get(case, ("", {}))
    model = adapted_model(name, **changes) if name else net()
    generator = saved(model, tmp_path / "adapter")
    assert generator.tasks == TASKS
    for format in FORMATS:
        live = outcome(lambda folder, format=format: export_lora(model, "beta", folder, format=format), tmp_path)
        made = outcome(lambda folder, format=format: generator.save("beta", folder, format=format), tmp_path)
        assert made == live
        assert isinstance(live, dict) or format != "peft"
    export_lora(model, "beta", tmp_path / "live")
    state = load_file(tmp_path / "live" / "adapter_model.safetensors")
    made_state = generator.state_dict("beta")
    assert state.keys() == made_state.keys()
    assert all(torch.equal(made_state[key], value) for key, value in state.items())
    assert generator.r == 16 if case == "patterns" else 8
