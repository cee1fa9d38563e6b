"""What the documentation's code works on in tests: tiny models under real names on a local Hub, and small data."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CAUSAL, ENCODER = "Qwen/Qwen2.5-0.5B", "google-bert/bert-base-uncased"
MIXTURE = "Qwen/Qwen3-30B-A3B"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "<|endoftext|>"]
_SIZES = {
    "vocab_size": 256 + len(_SPECIAL),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Label -> texts.
_TASKS: dict[str, dict[str, list[str]]] = {
    "trec": {
        "person": ["Who wrote Dracula?", "Who painted the Night Watch?", "Who invented the telephone?"],
        "place": ["Where is Lake Ontario?", "What city has the oldest zoo?", "Where do kiwis live?"],
        "number": ["How many bones has a hand?", "When did the Titanic sink?", "How far away is the Moon?"],
    },
    "sms_spam": {
        "spam": ["You won a prize! Call now.", "Free ringtones, text YES.", "Claim your cash today!"],
        "genuine": ["Are you home yet?", "See you at eight.", "Thanks for the lift."],
    },
    # Of the labels of sms_spam, as a task that is added later needs.
    "mail_spam": {
        "spam": ["Cheap watches, order now.", "Your account wins."],
        "genuine": ["The minutes are attached.", "Lunch on Friday?"],
    },
}
_SPLITS = {"train": 24, "validation": 8, "test": 8}


def write_data(folder: Path) -> None:
    """``<task>/<split>.jsonl`` with the columns text, label, prompt and completion."""
    for task, texts in _TASKS.items():
        (folder / task).mkdir()
        rows = [(text, label) for label, examples in texts.items() for text in examples]
        for split, count in _SPLITS.items():
            drawn = random.Random(f"{task} {split}").choices(rows, k=count)
            lines = [
                json.dumps({"text": text, "label": label, "prompt": f"{text} ", "completion": label})
                for text, label in [*rows, *drawn][:count]
            ]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_models(folder: Path) -> dict[str, Path]:
    """Write the random models; name on the Hub -> folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: dict[str, Any] = {
            CAUSAL: Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2, bos_token_id=3, eos_token_id=3)),
            ENCODER: BertForSequenceClassification(BertConfig(**_SIZES)),
            MIXTURE: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **_EXPERTS)),
        }
    folders = {}
    for name, model in made.items():
        folders[name] = folder / name.replace("/", "--")
        model.save_pretrained(folders[name])
        _tokenizer(name != ENCODER).save_pretrained(folders[name])
    return folders


def _tokenizer(is_causal: bool) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    letters = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if is_causal:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            chat_template=_CHAT,
            model_max_length=256,
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
