"""Tasks whose condition is examples: given, saved, added in one pass, fitted; and what is refused."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hyperadapt import LoraGenerator, diagnose, export_lora
from hyperadapt.cards import write_card
from tests.support.example_rows import MIXED_SOURCES, batch_of, example_model, rows_of, with_examples
from tests.support.helpers import (
    TASKS,
    adapted_model,
    adapter_config,
    base_model,
    letters,
    logits,
    row_of,
    run_python,
    snapshot,
    trainable,
)
from tests.support.tolerances import FLOAT32_FORWARD

CLOSE = {"rtol": FLOAT32_FORWARD, "atol": FLOAT32_FORWARD}
NEW = "What language is it?"


def inputs(architecture: str = "llama") -> dict[str, Tensor]:
    batch = batch_of(architecture, 4)
    if architecture == "t5":
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}


def table(model: PeftModel, adapter_name: str = "default") -> Any:
    return model.base_model.router.network(adapter_name).task_embedding


def outputs(model: PeftModel, tasks: list[str], architecture: str = "llama") -> list[Tensor]:
    return [logits(model, inputs(architecture), tasks=task) for task in tasks]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_every_architecture_reads_examples_and_is_left_as_it_was(architecture: str) -> None:
    model = example_model(architecture)
    model.base_model.model.train()
    next(model.parameters()).requires_grad_(False)
    before, trained = snapshot(model.base_model.model), trainable(model)
    model.set_examples({name: rows_of(architecture, 8, seed) for seed, name in enumerate(TASKS)})
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model.base_model.model).items())
    assert trainable(model) == trained
    assert model.base_model.model.training
    model.train()
    model(**batch_of(architecture, 4), tasks=[*TASKS, "beta"]).loss.backward()
    assert all(one.grad.any() for name, one in model.named_parameters() if ".example_encoder." in name)
    old = outputs(model.eval(), TASKS, architecture)
    assert not torch.allclose(old[0], old[1], atol=1e-3)
    model.add_task("new", examples=rows_of(architecture, 6, 9))
    assert same(outputs(model, TASKS, architecture), old)
    new = logits(model, inputs(architecture), tasks="new")
    assert not any(torch.allclose(new, one, atol=1e-3) for one in old)


def test_features_are_those_of_the_plain_base_model() -> None:
    model, plain = with_examples("bert"), base_model("bert")
    batch = batch_of("bert", 8, 0)
    mask = batch["attention_mask"][..., None].float()
    hidden = plain.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    features = torch.cat([(hidden * mask).sum(1) / mask.sum(1), torch.eye(3)[batch["labels"]]], 1)
    embedding = table(model)
    expected = embedding.example_rows.kept(embedding.example_encoder.scaled(features.detach()))
    assert torch.allclose(embedding.example_rows.vectors[0], expected, rtol=1e-4, atol=1e-4)
    # Whatever the adapter does, and whatever task is in force.
    first = model.embed_examples(rows_of("bert"))
    model.set_task("gamma")
    with model.disable_adapter():
        assert torch.equal(model.embed_examples(rows_of("bert")), first)
    assert torch.equal(model.embed_examples(rows_of("bert")), first)


@pytest.mark.parametrize("sources", ["examples", "text+examples", MIXED_SOURCES])
def test_a_saved_adapter_needs_no_rows(sources: Any, tmp_path: Path) -> None:
    model = with_examples("llama", sources)
    model.add_task("new", examples=rows_of("llama", 6, 9), description=NEW, text_encoder=letters)
    tasks = [*TASKS, "new"]
    expected = outputs(model, tasks)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert same(outputs(loaded, tasks), expected)
    assert loaded.peft_config["default"].task_sources[:3] == model.peft_config["default"].task_sources[:3]
    code = """
import sys, torch, hyperadapt
from peft import PeftModel
from tests.support.helpers import base_model
batch, mix = torch.load(sys.argv[2])
model = PeftModel.from_pretrained(base_model("llama"), sys.argv[1])
with torch.no_grad():
    torch.save(model(**batch, tasks=mix).logits, sys.argv[3])
"""
    mix = ["new", "beta", "alpha", "gamma"]
    torch.save((inputs(), mix), tmp_path / "batch.pt")
    run_python(code, tmp_path, tmp_path / "batch.pt", tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, inputs(), tasks=mix))
    # A loaded adapter goes on from the rows that were saved, and adds tasks as the first does.
    loaded.requires_grad_(True).train()
    loaded(**batch_of("llama", 4), tasks=mix).loss.backward()
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    for one in (model, again):
        one.add_task("other", examples=rows_of("llama", 5, 11))
    assert same(outputs(again, ["other"]), outputs(model, ["other"]))


def test_sources_mix_in_one_batch() -> None:
    model = with_examples("llama", MIXED_SOURCES)
    model.add_task("new", examples=rows_of("llama", 6, 9))
    mix = ["alpha", "new", "gamma", "beta"]
    mixed = logits(model, inputs(), tasks=mix)
    for row, task in enumerate(mix):
        assert torch.allclose(mixed[row : row + 1], logits(model, row_of(inputs(), row), tasks=task), **CLOSE)


@pytest.mark.parametrize(
    "changes", [{}, {"conditioning": "bilinear", "task_embedding_dim": 32}], ids=["gated", "bilinear"]
)
def test_the_order_of_rows_does_not_count_and_swapped_labels_do(changes: dict[str, Any], tmp_path: Path) -> None:
    model = with_examples("bert", **changes)
    rows = rows_of("bert", 6, 9)
    embedding = model.embed_examples(rows)
    assert torch.allclose(
        model.embed_examples(Dataset.from_list([rows[i] for i in (3, 1, 5, 0, 2, 4)]).with_format("torch")),
        embedding,
        **CLOSE,
    )
    swapped = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows]
    assert torch.cosine_similarity(model.embed_examples(swapped), embedding, dim=0) < 0.95
    assert torch.equal(
        logits(model, inputs("bert"), task_embeddings=embedding),
        (model.add_task("new", examples=rows), logits(model, inputs("bert"), tasks="new"))[1],
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base_model("bert"), tmp_path).embed_examples(rows), embedding)


def test_a_description_is_added_where_the_adapter_knows_text() -> None:
    model = with_examples("llama", "text+examples")
    rows = rows_of("llama", 6, 9)
    parts = model.embed_examples(rows), model.embed_description(NEW, text_encoder=letters)
    both = model.embed_examples(rows, description=NEW, text_encoder=letters)
    assert torch.equal(both, parts[0] + parts[1])
    for name, given in (
        ("text", {"description": NEW}),
        ("examples", {"examples": rows}),
        ("two", {"description": NEW, "examples": rows}),
    ):
        model.add_task(name, **given, text_encoder=letters)
    found = table(model)(torch.tensor([3, 4, 5]))
    assert torch.allclose(found, torch.stack([parts[1], parts[0], both]), **CLOSE)
    assert model.peft_config["default"].task_sources[3:] == ["text", "learned", "learned"]


def test_fitting_starts_at_what_examples_give() -> None:
    model = with_examples("bert", normalization="frobenius")
    rows = rows_of("bert", 40, 9)
    batch = batch_of("bert", 40, 9)
    start = model.embed_examples(rows[:32])

    def loss(**routing: Any) -> float:
        with torch.no_grad():
            return float(model(**batch, **routing).loss)

    from hyperadapt.tasks import fitting

    arguments = fitting.default_arguments("unused", 40, torch.device("cpu"))
    arguments.max_steps, arguments.learning_rate = 1, 0.0
    model.add_task("unfitted", examples=rows[:32], training_arguments=arguments)
    assert torch.equal(table(model).weight[0], start)
    model.add_task("fitted", examples=rows, fit=True)
    assert loss(tasks="fitted") < loss(task_embeddings=start)


def test_tables_change_around_tasks_with_examples() -> None:
    model = with_examples("llama", MIXED_SOURCES)
    before = dict(zip(TASKS, outputs(model, TASKS), strict=True))
    model.add_task("new", examples=rows_of("llama", 6, 9))
    model.interpolate_tasks("between", {"beta": 1, "gamma": 1})
    model.rename_task("gamma", "delta")
    model.remove_task("alpha")
    assert same(outputs(model, ["beta", "delta"]), [before["beta"], before["gamma"]])
    copied = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="Task 'beta' was the last one with descriptions"):
        model.remove_task("beta")
    with pytest.warns(
        UserWarning, match="Task 'delta' was the last one with examples, and what reads examples is gone"
    ):
        model.remove_task("delta")
    config = model.peft_config["default"]
    assert (config.task_embedding, config.example_dim, config.example_classes) == ("learned", None, None)
    assert same(outputs(copied, ["beta", "delta"]), [before["beta"], before["gamma"]])
    copied.set_examples({"delta": rows_of("llama", 8, 20)})
    assert same(outputs(copied, ["beta"]), [before["beta"]])
    assert not torch.equal(logits(copied, inputs(), tasks="delta"), before["gamma"])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_tables_change_before_there_are_examples(architecture: str) -> None:
    model = example_model(architecture, "examples")
    model.rename_task("gamma", "delta")
    model.add_task("new", embedding=torch.ones(8))
    model.set_examples({name: rows_of(architecture, 8, seed) for seed, name in enumerate(["alpha", "beta", "delta"])})
    expected = with_examples(architecture)
    assert same(outputs(model, ["alpha", "delta"], architecture), outputs(expected, ["alpha", "gamma"], architecture))


@pytest.mark.parametrize("sources", ["learned", "text", "both", "examples", "text+examples", MIXED_SOURCES], ids=str)
def test_a_second_adapter_of_the_same_configuration_is_a_copy(sources: Any) -> None:
    """As TRL makes its reference: the configuration that is there, and then the parameters."""
    model = with_examples("llama", sources) if "examples" in str(sources) else example_model("llama", sources)
    expected = outputs(model, TASKS)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")).data)
    model.set_adapter("ref")
    assert same(outputs(model, TASKS), expected)
    assert same(list(table(model, "ref").buffers()), list(table(model).buffers()))


def test_a_generator_reads_examples_with_its_own_adapter() -> None:
    model = with_examples("llama")
    generator = LoraGenerator.from_model(model)
    expected = generator.from_examples(rows_of("llama", 6, 9)).state_dict()
    torch.manual_seed(5)
    model.add_adapter("two", adapter_config(task_embedding="examples", task_type="CAUSAL_LM"))
    model.set_adapter("two")
    model.set_examples({name: rows_of("llama", 8, seed) for seed, name in enumerate(TASKS)})
    made = generator.from_examples(rows_of("llama", 6, 9)).state_dict()
    assert same(list(made.values()), list(expected.values()))


def test_lora_card_and_diagnosis(tmp_path: Path) -> None:
    model = with_examples("llama")
    rows = rows_of("llama", 6, 9)
    made = LoraGenerator.from_model(model).from_examples(rows)
    made.save(tmp_path / "made")
    model.add_task("new", examples=rows)
    export_lora(model, "new", tmp_path / "exported")
    name = "adapter_model.safetensors"
    assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
    assert "from examples" in (tmp_path / "made" / "README.md").read_text()
    model.save_pretrained(tmp_path / "adapter")
    generator = LoraGenerator.from_pretrained(tmp_path / "adapter")
    generator.save("beta", tmp_path / "beta")
    export_lora(model, "beta", tmp_path / "live")
    assert (tmp_path / "beta" / name).read_bytes() == (tmp_path / "live" / name).read_bytes()
    assert str(diagnose(generator.network)) == str(diagnose(model))
    write_card(model, tmp_path / "adapter", overwrite=True)
    with pytest.raises(ValueError, match="made from an adapter's files, and examples are read by the base model"):
        generator.from_examples(rows)


def test_an_adapter_without_examples_yet(tmp_path: Path) -> None:
    model = example_model()
    for call in (lambda: model(**inputs(), tasks="alpha"), lambda: model.embed_examples(rows_of("llama"))):
        with pytest.raises(RuntimeError, match="has no examples of its tasks yet, which task_embedding='examples'"):
            call()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    with pytest.raises(RuntimeError, match="has no examples of its tasks yet"):
        loaded(**inputs(), tasks="alpha")


def test_a_narrow_base_keeps_vectors_in_float32() -> None:
    base = base_model("llama").to(torch.bfloat16)
    config = adapter_config(target_modules="all-linear", task_embedding="examples", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.set_examples({name: rows_of("llama", 8, seed) for seed, name in enumerate(TASKS)})
    rows, encoder = table(model).example_rows, table(model).example_encoder
    assert {one.dtype for one in (rows.vectors, rows.bank, encoder.mean, encoder.deviation)} == {torch.float32}
    assert encoder.readout.weight.dtype == torch.bfloat16
    assert logits(model, inputs(), tasks="beta").isfinite().all()


def test_a_base_model_that_cannot_read() -> None:
    config = adapter_config(target_modules=["0"], task_embedding="examples")
    with pytest.raises(ValueError, match="but Sequential is no model of transformers with a hidden_size"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)


ROWS = rows_of("bert", 6)
PAIRS = rows_of("llama", 4)


@pytest.mark.parametrize(
    ("architecture", "call", "error", "message"),
    [
        ("bert", lambda m: m.add_task("new", examples=[]), ValueError, "examples has no rows"),
        ("bert", lambda m: m.add_task("new", examples=[3]), TypeError, "Row 0 of examples is 3, but must be a dict"),
        (
            "bert",
            lambda m: m.add_task("new", examples=ROWS[:1]),
            ValueError,
            "Task 'new', examples: all 1 rows have the class 0. Give examples of at least two classes.",
        ),
        (
            "bert",
            lambda m: m.add_task("new", examples=[{**row, "labels": torch.tensor(7)} for row in ROWS]),
            ValueError,
            "Task 'new', examples, from row 0: the class 7 is unknown: the adapter was made for 3 classes, from 0 to 2",
        ),
        (
            "bert",
            lambda m: m.add_task("new", examples=ROWS * 6),
            ValueError,
            "Task 'new', examples has 36 rows, but the adapter was trained to read 32 at most. Give so many, or pass",
        ),
        (
            "bert",
            lambda m: m.embed_examples([{"input_ids": row["input_ids"]} for row in ROWS]),
            ValueError,
            "examples, from row 0: there are no labels, only ['input_ids']. Every example needs those of training.",
        ),
        (
            "bert",
            lambda m: m.embed_examples(
                [{"attention_mask": row["attention_mask"], "labels": row["labels"]} for row in ROWS]
            ),
            ValueError,
            "examples, from row 0: the base model does not take the columns ['attention_mask'] (You",
        ),
        (
            "bert",
            lambda m: m.embed_examples([{**row, "labels": row["input_ids"]} for row in ROWS]),
            ValueError,
            "labels are of shape (6, 7) and torch.int64, but the class of each row is expected",
        ),
        (
            "llama",
            lambda m: m.embed_examples([{**row, "labels": row["input_ids"]} for row in PAIRS]),
            ValueError,
            "examples, from row 0: a row lacks a prompt or a completion. Labels must be -100 in the prompt",
        ),
        (
            "llama",
            lambda m: m.embed_examples([{**row, "labels": torch.full_like(row["labels"], -100)} for row in PAIRS]),
            ValueError,
            "a row lacks a prompt or a completion",
        ),
        ("llama", lambda m: m.set_examples({}), ValueError, "set_examples got no rows at all. Give those of the tasks"),
        (
            "llama",
            lambda m: m.set_examples({"none": PAIRS}),
            ValueError,
            "set_examples got rows for ['none'], but the tasks with examples are ['alpha', 'beta', 'gamma']",
        ),
        (
            "llama",
            lambda m: (m.set_task("beta"), m.merge_adapter(), m.embed_examples(PAIRS)),
            ValueError,
            "Task 'beta' is merged into the weights of the base model, which reads examples without an adapter",
        ),
    ],
)
def test_wrong_examples_are_refused(
    architecture: str, call: Callable[[PeftModel], Any], error: type[Exception], message: str
) -> None:
    model = with_examples(architecture)
    with pytest.raises(error, match=re.escape(message)):
        call(model)
    assert model.peft_config["default"].tasks == TASKS


def test_examples_mean_nothing_to_an_adapter_without_them() -> None:
    model = adapted_model("bert")
    with pytest.raises(ValueError, match=re.escape("has no task with examples (task_embedding='learned'), so it")):
        model.embed_examples(ROWS)
    with pytest.raises(ValueError, match="and this adapter has none"):
        model.set_examples({"alpha": ROWS})
    with pytest.raises(ValueError, match="has no task with a description"):
        with_examples("bert").add_task("new", description=NEW)
    with pytest.raises(ValueError, match=re.escape("got no rows for the tasks ['gamma'], which have none yet")):
        example_model("bert").set_examples({"alpha": ROWS, "beta": ROWS})
    same_rows = [{**ROWS[0], "labels": torch.tensor(one)} for one in (0, 1)]
    example_model("bert").set_examples(dict.fromkeys(TASKS, same_rows))
