"""What the base model makes of rows, and files in which that is wrong."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hyperadapt import LoraGenerator
from tests.support.example_rows import batch_of, rows_of, with_examples
from tests.support.helpers import base_model


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
