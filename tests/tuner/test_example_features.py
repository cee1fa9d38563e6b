"""What the base model makes of rows, and files in which that is wrong."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorWithFlattening,
    FunnelConfig,
    FunnelForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    default_data_collator,
)

from hyperadapt import LoraGenerator
from hyperadapt.tuner.example_features import raw_vectors
from tests.support.example_rows import batch_of, rows_of, with_examples
from tests.support.helpers import TASKS, adapter_config, base_model
from tests.support.tolerances import FLOAT32_FORWARD


def test_features_of_pairs_are_means_over_prompt_and_completion() -> None:
    model, plain, batch = with_examples("llama"), base_model("llama"), batch_of("llama", 8, 0)
    hidden = plain.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    raw = torch.cat([hidden[:, :3].mean(1), hidden[:, 3:].mean(1)], 1).detach()
    embedding = model.base_model.router.network("default").task_embedding
    expected = embedding.example_rows.kept(embedding.example_encoder.scaled(raw))
    assert torch.allclose(embedding.example_rows.vectors[0], expected, rtol=1e-4, atol=1e-4)


def test_many_rows_are_read_in_several_batches() -> None:
    model = with_examples("bert")
    rows = rows_of("bert", 40)
    model.set_examples({"alpha": rows})
    first = model.base_model.router.network("default").task_embedding.example_rows.parts()[0][1]
    model.set_examples({"alpha": rows[:20], "beta": rows[20:]})
    parts = model.base_model.router.network("default").task_embedding.example_rows.parts()
    both = torch.cat([parts[0][1], parts[1][1]])
    assert torch.allclose(both[both[:, 0].argsort()], first[first[:, 0].argsort()], rtol=1e-4, atol=1e-4)


def test_what_is_no_rows_is_refused() -> None:
    model = with_examples("bert")
    for give in (
        lambda rows: model.add_task("new", examples=rows),
        model.embed_examples,
        LoraGenerator.from_model(model).from_examples,
        lambda rows: model.set_examples({"beta": rows}),
    ):
        with pytest.raises(TypeError, match=r"examples is of type list_iterator, but must be a datasets\.Dataset"):
            give(iter(rows_of("bert")))
    with pytest.raises(TypeError, match="examples is of type NoneType, but must be a"):
        model.embed_examples(None)
    with pytest.raises(TypeError, match="set_examples got a NoneType, but needs a dict, task name -> rows: pass"):
        model.set_examples(None)


def test_rows_that_a_collator_joins_are_read_one_by_one() -> None:
    model, rows = with_examples("llama"), [dict(row) for row in rows_of("llama", 6, 9)]
    for row, length in zip(rows, (7, 5, 6, 4, 7, 5), strict=True):
        row.update({name: row[name][:length].tolist() for name in ("input_ids", "labels")}, attention_mask=[1] * length)
    joined = model.embed_examples(rows, data_collator=DataCollatorWithFlattening())
    padded = model.embed_examples(rows, data_collator=padding)
    assert torch.allclose(joined, padded, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    with pytest.raises(ValueError, match="from row 0: the data_collator made 2 rows of one, but an example is one row"):
        model.embed_examples(rows, data_collator=lambda some: padding(2 * some))


def padding(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def audio(lengths: list[int]) -> dict[str, Tensor]:
    """Padded waves."""
    generator = torch.Generator().manual_seed(1)
    waves = [torch.randn(length, generator=generator) for length in lengths]
    return {
        "input_values": pad_sequence(waves, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(wave).long() for wave in waves], batch_first=True),
        "labels": torch.arange(len(lengths)) % 2,
    }


def test_padding_of_audio_does_not_count() -> None:
    layers = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    base = Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**layers, **sizes, **positions, feat_extract_norm="layer", classifier_proj_size=8, num_labels=2)
    )
    model = get_peft_model(
        base, adapter_config(target_modules=["q_proj"], task_embedding="examples", task_type="SEQ_CLS")
    )
    batch = audio([300, 120, 210, 90])
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    alone = [
        {name: value[: row["attention_mask"].sum()] if value.ndim else value for name, value in row.items()}
        for row in rows
    ]
    tuner = model.base_model
    read = partial(raw_vectors, tuner.model, tuner.router, tuner.peft_config["default"])
    expected = torch.cat([read([row], default_data_collator, "rows") for row in alone])
    close = {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}
    assert torch.allclose(read(rows, default_data_collator, "rows"), expected, **close)


def test_a_mask_of_another_length_is_refused() -> None:
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 100, "num_labels": 3}
    base = FunnelForSequenceClassification(FunnelConfig(block_sizes=[1, 1], **sizes))
    model = get_peft_model(
        base, adapter_config(target_modules=["q_head"], task_embedding="examples", task_type="SEQ_CLS")
    )
    rows = rows_of("bert", 8)
    model.set_examples(dict.fromkeys(TASKS, rows[:7]))
    # The last one is padded.
    with pytest.raises(
        ValueError,
        match=r"attention_mask has shape \(8, 7\), but the hidden states \(8, 4\), .* Give rows of one length",
    ):
        model.embed_examples(rows)


@pytest.mark.parametrize(
    ("name", "size", "value", "problem"),
    [
        ("example_rows.vectors", (3, 32, 64), torch.nan, "holds a vector that is not finite"),
        ("example_encoder.mean", (64,), torch.inf, "holds a vector that is not finite"),
        ("example_encoder.deviation", (64,), 0.0, "holds a deviation that is not finite and above 0"),
        ("example_rows.vectors", (3, 31, 64), 1.0, "has shape (3, 31, 64) instead of (3, 32, 64)"),
    ],
)
def test_examples_in_a_file_that_are_wrong(
    name: str, size: tuple[int, ...], value: float, problem: str, tmp_path: Path
) -> None:
    with_examples("llama").save_pretrained(tmp_path)
    path, name = tmp_path / "adapter_model.safetensors", f"base_model.hyperadapter_networks.task_embedding.{name}"
    weights = load_file(path)
    assert name in weights
    save_file(weights | {name: torch.full(size, value)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{name!r} {problem}")):
        LoraGenerator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{problem}")):
        PeftModel.from_pretrained(base_model("llama"), tmp_path)
