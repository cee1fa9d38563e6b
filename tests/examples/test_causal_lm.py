"""Text tasks as chats, answers by generation, and the example from data to table, far too short to learn anything."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples import train_causal_lm
from examples.support import causal_lm
from examples.support.text_tasks import encoder_path, load_task
from tests.support.card_schema import check_example_card
from tests.support.helpers import adapter_config, make_active

trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    try:
        encoder_path()
        return causal_lm.load_tokenizer()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=49152,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["trec6", "stereoset_rel", "bbc"])
def test_chats(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load_task(name)
    rows = causal_lm.chats(task, "train", tokenizer, max_rows=40, max_tokens=16)
    assert len(rows) == 40
    for row, source in zip(rows, task.train, strict=False):
        system, user = row["prompt"]
        assert all(label in system["content"] for label in task.labels)
        assert [message["content"] for message in row["completion"]] == [task.labels[source["label"]]]
        assert len(tokenizer(user["content"])["input_ids"]) <= 16 + 2
        text, pair = source["text"], source["text_pair"]
        assert user["content"].split("\n")[0] == text[: len(user["content"].split("\n")[0])]
        if pair is not None:
            assert user["content"].split("\n")[1] == pair[: len(user["content"].split("\n")[1])]


def test_exact_matches(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = causal_lm.chats(load_task("sms_spam"), "train", tokenizer, max_rows=3, max_tokens=8)
    right = [completion[0]["content"] for completion in rows["completion"]]
    assert causal_lm.exact_matches([right[0], right[1].upper() + ".", f"It is {right[2]}"], rows) == [True, True, False]


def test_answers_of_a_batch_are_those_of_its_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = causal_lm.chats(load_task("trec6"), "test", tokenizer, max_rows=4, max_tokens=16)
    model = make_active(
        get_peft_model(small_model(), adapter_config(target_modules="all-linear", task_type="CAUSAL_LM"))
    )
    tasks = ["alpha", "gamma", "beta", "alpha"]
    given = causal_lm.answers(model, tokenizer, rows, tasks)
    assert given == [
        causal_lm.answers(model, tokenizer, rows.select([index]), [task])[0] for index, task in enumerate(tasks)
    ]
    assert given != causal_lm.answers(model, tokenizer, rows, ["alpha"] * 4)


def test_train_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (train_causal_lm, causal_lm):
        monkeypatch.setattr(module, "load_base", lambda dtype: small_model())
    options = ["--fast", "--steps", "3", "--rows", "20"]
    monkeypatch.setattr("sys.argv", ["train_causal_lm", *options])
    train_causal_lm.main()
    lines = capfd.readouterr().out.strip().splitlines()
    assert re.match(r"trainable parameters: [\d,]+ of [\d,]+; 3 steps; \d+ seconds on c", lines[-1])
    table = {line.split()[0]: line.split()[1:] for line in lines[-12:-2]}
    assert set(table) == {*train_causal_lm.TASKS, "mean"}
    means = [sum(float(table[name][column]) for name in train_causal_lm.TASKS) / 9 for column in (1, 2, 3)]
    assert all(abs(mean - float(shown)) < 1e-3 for mean, shown in zip(means, table["mean"], strict=True))
    check_example_card(Path("runs/causal_lm/hyperadapter"), "train_causal_lm")


@pytest.mark.slow
def test_the_real_base_model_speaks(tokenizer: PreTrainedTokenizerBase) -> None:
    model = causal_lm.load_base(torch.float32)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
