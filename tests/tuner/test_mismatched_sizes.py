"""Adapters for a base model whose head or vocabulary has another size, with and without ``ignore_mismatched_sizes``."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.support.helpers import (
    MIXED,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    logits,
    make_active,
    snapshot,
)

BATCH = example_batch("llama", labels=False)
WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.weight"
NORMS = "base_model.hyperadapter_networks.base_norms"

# transformers' own, of what PEFT asks it; pytest.warns lets it through.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted_model("llama", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])


@pytest.fixture
def folder(model: PeftModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


SHAPES = {"rows": (110, 32), "columns": (100, 16), "dimensions": (3200,)}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", SHAPES)
def test_a_saved_module_of_another_size_can_be_left_out(
    model: PeftModel, folder: Path, case: str, low_cpu_mem_usage: bool
) -> None:
    weights = load_file(folder / WEIGHTS) | {HEAD: torch.ones(SHAPES[case])}
    save_file(weights, folder / WEIGHTS)
    message = "base_model.model.lm_head.modules_to_save.x.weight: found shape"
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.warns(UserWarning, match=message):
        first = PeftModel.from_pretrained(base_model("llama"), folder, "x", **options)
    further = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=message):
        further.load_adapter(folder, "x", **options)
    further.set_adapter("x")
    in_use = copy.deepcopy(model)
    in_use.add_adapter("x", model.peft_config["default"])
    with pytest.warns(UserWarning, match=message):
        set_peft_model_state_dict(in_use, weights, "x", ignore_mismatched_sizes=True)
    in_use.set_adapter("x")
    for loaded in (first, further, in_use):
        # The head is the base model's, as it is in the model that the file is from.
        assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))
        before = snapshot(loaded)
        with pytest.raises(ValueError, match=r"'base_model\.model\.lm_head\.modules_to_save\.x\.weight' has shape"):
            set_peft_model_state_dict(loaded, weights | {NORMS: torch.full((4,), 9.0)}, "x")
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(loaded).items())
        loaded.load_state_dict(before)


def test_tensors_of_the_network_cannot_be_left_out(model: PeftModel, folder: Path) -> None:
    for changes in ({"task_embedding_dim": 4}, {"hypernetwork_dim": 8}):
        other = copy.deepcopy(model)
        other.add_adapter("x", adapter_config(**changes, target_modules=["q_proj", "up_proj"]))
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"but for those of the network, all of which are needed\.$"):
            other.load_adapter(folder, "x", ignore_mismatched_sizes=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(other).items())


def test_embeddings_of_another_size_saved_along_can_be_left_out(tmp_path: Path) -> None:
    resized = base_model("llama")
    resized.resize_token_embeddings(110, mean_resizing=False)
    trained = make_active(get_peft_model(resized, adapter_config(target_modules=["q_proj"])))
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    base = base_model("llama")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' has shape \(110, 32\) instead of \(100, 32\)"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight: found shape torch\.Size\(\[110, 32\]\)"):
        loaded = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.get_input_embeddings().weight, base_model("llama").get_input_embeddings().weight)
    expected = logits(trained, BATCH, tasks=MIXED)[..., :100]
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), expected)
