"""Recipes that train in seconds: tiny models with a tokenizer of whole words, and data that they can learn."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hyperadapt.recipes import Recipe, load_recipe
from hyperadapt.runs import train

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "user:", "assistant:"]
WORDS = [*"abcdefghijklmnop", "good", "bad", "spam", "ham", "yes", "no"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FILES = [
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "record.json"),
    *("tokenizer.json", "tokenizer_config.json"),
]
WEIGHTS = "adapter_model.safetensors"
ADAPTER = {"target_modules": "all-linear", "r": 4, "task_embedding_dim": 8, "hypernetwork_dim": 16}


def tokenizer(task_type: str) -> PreTrainedTokenizerBase:
    """One token for each of ``SPECIAL`` and ``WORDS``; without a padding token for language models."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if task_type == "CAUSAL_LM":
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
        return PreTrainedTokenizerFast(
            tokenizer_object=words,
            unk_token="[UNK]",
            bos_token="<s>",
            eos_token="</s>",
            chat_template=CHAT_TEMPLATE,
            model_max_length=32,
        )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_base(folder: Path, task_type: str) -> None:
    """Write a random model with its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if task_type == "CAUSAL_LM":
            model: Any = LlamaForCausalLM(LlamaConfig(**_SIZES, bos_token_id=4, eos_token_id=5))
        else:
            model = BertForSequenceClassification(
                BertConfig(**_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            )
    model.save_pretrained(folder)
    tokenizer(task_type).save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labelled_rows(count: int, seed: int, labels: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows whose label is the one of a word that stands somewhere in the text."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        word = chooser.choice(list(labels))
        text = [*chooser.choices(WORDS[:16], k=chooser.randint(0, 3)), word]
        chooser.shuffle(text)
        rows.append({"text": " ".join(text), "label": labels[word]})
    return rows


def write_recipe(folder: Path, task_type: str, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a base model, the data of two tasks that share labels, one of a third, and a recipe."""
    save_base(folder / "base", task_type)
    tasks = {
        "reviews": {"good": "positive", "bad": "negative"},
        "letters": {"yes": "positive", "no": "negative"},
        "mail": {"spam": "junk", "ham": "mail"},
    }
    for seed, (name, labels) in enumerate(tasks.items()):
        for split, count in (("train", 40), ("validation", 12), ("test", 16)):
            rows = labelled_rows(count, 10 * seed + len(split), labels)
            if task_type == "CAUSAL_LM":
                # The answer is one of the known words.
                words = {"positive": "yes", "negative": "no", "junk": "spam", "mail": "ham"}
                rows = [{"prompt": row["text"], "completion": words[row["label"]]} for row in rows]
            write_rows(folder / "data" / name / f"{split}.jsonl", rows)
    splits = ("train", "validation", "test")
    descriptions = {name: f"Tell {' from '.join(labels)}." for name, labels in tasks.items()}
    content = {
        "base_model": "base",
        "output_dir": str(folder / "run"),
        "adapter": {"task_type": task_type, **ADAPTER},
        "tasks": {
            name: {"description": text, **{split: f"data/{name}/{split}.jsonl" for split in splits}}
            for name, text in descriptions.items()
        },
        "training": {"max_steps": 10, "per_device_train_batch_size": 8, "use_cpu": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **(changes or {})}, sort_keys=False), encoding="utf-8")
    return path


def recipe(folder: Path, task_type: str = "SEQ_CLS", **changes: Any) -> Recipe:
    """The recipe, read."""
    return load_recipe(write_recipe(folder, task_type, changes))


def silent(made: Recipe, **options: Any) -> Path:
    """Train without a word or a picture; the folder."""
    return train(made, report=None, figures=False, **options).folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training(**changes: Any) -> dict[str, Any]:
    """Changes of a recipe in its training section."""
    return {"training": {"max_steps": 10, "per_device_train_batch_size": 8, "use_cpu": True, **changes}}


def stopped(made: Recipe, line: str, **options: Any) -> None:
    """Train until a line is reported, and stop as Ctrl-C does."""

    def report(text: str) -> None:
        if line in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(made, report=report, figures=False, **options)
