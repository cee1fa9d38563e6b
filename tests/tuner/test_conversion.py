"""PEFT's own conversion to LoRA agrees with the exact export."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from torch.testing import assert_close

from hyperadapt import export_lora
from tests.support.helpers import adapted_model, base_model, example_batch, logits
from tests.support.tolerances import FLOAT32_FORWARD

# PEFT decomposes ΔW, of rank 4, in float32.
# Without BERT's classifier, which has fewer outputs than the rank.
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_fc"], "llama": "all-linear"}
CLOSE = {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}


# PEFT's conversion leaves fan_in_fan_out out of the config that it writes.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("normalization", ["soft_frobenius", "whitening"])
def test_conversions_of_a_task_agree(name: str, normalization: str, tmp_path: Path) -> None:
    model = adapted_model(name, normalization=normalization, target_modules=TARGETS[name]).double()
    batch = example_batch(name, labels=False)
    model.set_task("beta")
    expected = logits(model, batch)
    export_lora(model, "beta", tmp_path / "export")
    save_as_lora(tmp_path / "converted", model, rank=4)
    for folder in ("export", "converted"):
        lora = PeftModel.from_pretrained(base_model(name).double(), tmp_path / folder, autocast_adapter_dtype=False)
        assert isinstance(lora.peft_config["default"], LoraConfig)
        assert_close(logits(lora.eval(), batch), expected, **CLOSE)

    config, state_dict = convert_to_lora(model, rank=4)
    assert config.r == 4
    lora = get_peft_model(base_model(name).double(), config, autocast_adapter_dtype=False).eval()
    set_peft_model_state_dict(lora, state_dict)
    assert_close(logits(lora, batch), expected, **CLOSE)


def test_only_linear_layers_convert() -> None:
    assert adapted_model("llama").supports_lora_conversion()
    model = adapted_model("llama", target_modules=["q_proj", "embed_tokens"])
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*HyperAdapterEmbedding"):
        convert_to_lora(model, rank=4)


def test_unloading_returns_the_base_model() -> None:
    batch = example_batch("llama", labels=False)
    base = adapted_model("llama").unload()
    assert not any("hyperadapter" in name for name in base.state_dict())
    assert not base._forward_pre_hooks
    assert torch.equal(logits(base, batch), logits(base_model("llama"), batch))
