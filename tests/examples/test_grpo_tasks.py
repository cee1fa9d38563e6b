"""The example of rewards from data to table, on a model far too small to learn anything."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")

from examples import grpo_tasks
from examples.support.causal_lm import load_tokenizer
from examples.support.seeds import print_over_seeds
from examples.support.text_tasks import encoder_path

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def small_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=49152, bos_token_id=1, eos_token_id=2, pad_token_id=2))


def test_grpo_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        encoder_path()
        load_tokenizer()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(grpo_tasks, "load_base", small_model)
    monkeypatch.setattr("sys.argv", ["grpo_tasks", "--fast", "--output", str(tmp_path)])
    grpo_tasks.main()
    head, _, *table = capsys.readouterr().out.strip().splitlines()[-5:]
    assert head == "| over 1 seed | reward before | after |"
    assert [line.split(" | ")[0] for line in table] == [f"| {name}" for name in grpo_tasks.REWARDS]
    assert all(re.fullmatch(r"\| \w+ \| \d\.\d\d \| \d\.\d\d \|", line) for line in table)
    [run] = map(json.loads, (tmp_path / "seeds.jsonl").read_text(encoding="utf-8").splitlines())
    assert (run["seed"], run["settings"]["steps"]) == (0, 2)


def test_seeds_of_the_same_settings_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, steps, after in ((0, 5, 0.3), (1, 5, 0.5), (0, 9, 1.0), (1, 5, 0.7)):
        options = Namespace(output=tmp_path, seed=seed, steps=steps)
        print_over_seeds(options, {"brief": {"before": 0.25, "after": after}})
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2] == "| brief | 0.25 | 0.30 |"
    # Two seeds, of which one was run again: the mean of 0.3 and 0.7, with Student's t for one degree of freedom.
    assert lines[-3:] == ["| over 2 seeds | before | after |", "|---|---|---|", "| brief | 0.25 ± 0.00 | 0.50 ± 2.54 |"]


def test_rewards() -> None:
    chats = [[{"role": "assistant", "content": text}] for text in ("OK!!!!", "no", "")]
    assert grpo_tasks.excited(chats) == [1.0, 0.0, 0.0]
    assert grpo_tasks.loud(chats) == [2 / 6, 0.0, 0.0]
    assert grpo_tasks.brief([[1] * grpo_tasks.TOKENS, [1] * 6]) == [0.0, 0.75]
