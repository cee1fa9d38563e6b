"""Stand-ins for the Hub repositories that PEFT's tests load: tiny random models in a local cache, and data."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ConvNextImageProcessorPil,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

COMMIT = "0" * 40
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
# The usual weights, of size 0.02, would give such small models nearly constant outputs.
_TEXT = {"vocab_size": 1024, "initializer_range": 0.2}
_ENCODER = {**_SIZES, **_TEXT, "max_position_embeddings": 64}
_DECODER = {**_SIZES, **_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _opt(size: int = 16, ffn_dim: int = 37, layers: int = 3, init_std: float = 0.2) -> OPTForCausalLM:
    sizes = {"hidden_size": size, "word_embed_proj_dim": size, "ffn_dim": ffn_dim, "num_hidden_layers": layers}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, vocab_size=1024, init_std=init_std))


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2))


def _gptj() -> GPTJForCausalLM:
    return GPTJForCausalLM(GPTJConfig(**_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4))


def _bart() -> BartForConditionalGeneration:
    sizes = {f"{part}_{name}": 4 for part in ("encoder", "decoder") for name in ("ffn_dim", "attention_heads")}
    config = BartConfig(vocab_size=1024, d_model=16, encoder_layers=2, decoder_layers=2, init_std=0.2, **sizes)
    return BartForConditionalGeneration(config)


def _t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=1024, decoder_start_token_id=0, **sizes))


def _resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    # Twelve layers, as the tests count, of a size that fits the blocks of quantised weights.
    "peft-internal-testing/opt-125m": lambda: _opt(64, 128, 12, 0.1),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: MistralForCausalLM(MistralConfig(**_DECODER)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_DECODER, head_dim=8)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: BertModel(BertConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: RobertaModel(RobertaConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: DebertaModel(DebertaConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: DebertaV2Model(DebertaV2Config(**_ENCODER)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: BertForSequenceClassification(
        BertConfig(**_ENCODER)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: RobertaForSequenceClassification(
        RobertaConfig(**_ENCODER)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: LlamaForSequenceClassification(
        LlamaConfig(**_DECODER)
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _resnet,
}
_TEXTS = [
    f"{subject} {verb} {thing} ."
    for subject, verb, thing in itertools.product(
        ("a teacher", "the old sailor", "my neighbour"),
        ("never forgets", "looks for", "gives away", "dreams of"),
        ("a good book", "the long way home", "small things", "what was lost"),
    )
]


def english_quotes() -> DatasetDict:
    """Short sentences in the columns of the data set of quotes that PEFT's tests load."""
    columns = {"quote": _TEXTS, "author": ["nobody"] * len(_TEXTS), "tags": [["none"]] * len(_TEXTS)}
    return DatasetDict({"train": Dataset.from_dict(columns)})


def cat_image() -> Image.Image:
    """Noise in place of a picture."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))


def fill_cache(cache: Path) -> None:
    """Write the stand-ins as the Hub's client would cache the real repositories."""
    for name, make in _MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(_snapshot(cache, name, "main"))
    _tokenizer().save_pretrained(_snapshot(cache, "peft-internal-testing/tiny-random-OPTForCausalLM", "main"))
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 128})
    processor.save_pretrained(
        _snapshot(cache, "peft-internal-testing/tiny-random-ResNetForImageClassification", "main")
    )
    LoraConfig(r=8).save_pretrained(_snapshot(cache, "peft-internal-testing/tiny-opt-lora-revision", "test"))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *" ".join(_TEXTS).split()])
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def _snapshot(cache: Path, name: str, revision: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT)
    return repository / "snapshots" / COMMIT
