"""What a proposal to PEFT holds: the example in the form of PEFT's, and experiments for its method comparison."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hyperadapt import HyperAdapterConfig
from tests.support.docs_standins import CAUSAL, save_models, write_data
from tests.support.helpers import ROOT

FOLDER = ROOT / "examples" / "hyperadapter_finetuning"
EXPERIMENTS = sorted((FOLDER / "method_comparison/MetaMathQA/experiments/hyperadapter").iterdir())
# Fields of the comparison's TrainConfig, at commit 5d602fd of PEFT.
FIELDS = {
    *("model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile"),
    *("use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler"),
    *("use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix"),
}


def test_the_script_is_short() -> None:
    script = FOLDER / "hyperadapter_finetuning.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.filterwarnings(
    # TRL 1.16 uses names that transformers 5.23 deprecates.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)
def test_the_script_trains_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from examples.hyperadapter_finetuning.hyperadapter_finetuning import main

    base = save_models(tmp_path)[CAUSAL]
    write_data(tmp_path)
    options = [
        *("--base_model", base, "--data_path", tmp_path, "--tasks", "trec", "sms_spam", "--device", "cpu"),
        *("--output_dir", tmp_path / "adapter", "--num_epochs", 1, "--rank", 4, "--target_modules", "q_proj,v_proj"),
    ]
    monkeypatch.setattr("sys.argv", ["hyperadapter_finetuning.py", *map(str, options)])
    main()
    assert "trainable params" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    config = model.active_peft_config
    assert (config.tasks, config.r, set(config.target_modules)) == (["trec", "sms_spam"], 4, {"q_proj", "v_proj"})
    tokens = torch.tensor([[5, 6, 7]])
    logits = [model(tokens, tasks=task).logits for task in config.tasks]
    with model.disable_adapter():
        assert all(not torch.equal(model(tokens).logits, one) for one in logits)
    assert not torch.equal(*logits)


def test_both_experiments_are_there_and_listed() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXPERIMENTS) == 2
    assert all(f"| `{folder.name}` |" in page for folder in EXPERIMENTS)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_of_the_method_comparison_runs(folder: Path, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, HyperAdapterConfig)
    assert config.to_dict() == HyperAdapterConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32).to_dict() | {
        "peft_version": config.peft_version
    }
    training = folder / "training_params.json"
    parameters = json.loads(training.read_text()) if training.exists() else {}
    assert set(parameters) <= FIELDS
    rate = parameters.get("optimizer_kwargs", {"lr": 1e-4})["lr"]
    assert folder.name.endswith("lr_0.0001") == (rate == 1e-4)

    # As the comparison does it: no call names a task.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, pad_token_id=0)), config)
    tokens = torch.tensor([[5, 6, 7]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    before = model(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    with model.disable_adapter():
        assert torch.equal(model(tokens, labels=tokens).loss, before)
    assert model(tokens, labels=tokens).loss < before
    assert model.eval().generate(tokens, max_new_tokens=2).shape == (1, 5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
