"""Tasks added to a trained adapter, removed, renamed and mixed; the others keep every bit."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from hyperadapt import HyperAdapterConfig
from tests.support.helpers import (
    TASKS,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    letters,
    logits,
    make_active,
    minilm,
    run_python,
    trainable,
    two_adapters,
)
from tests.support.tolerances import FLOAT32_FORWARD

BATCH = example_batch("llama", labels=False)
DESCRIPTIONS = {
    "alpha": "Find the topic.",
    "beta": ["Is it spam?", "Tell spam from the rest."],
    "gamma": "Who wrote it?",
}
MIXED_SOURCES = {"alpha": "text", "beta": "both", "gamma": "learned"}
NEW = "What language is it?"


def text_model(sources: str | dict[str, str] = "text", architecture: str = "llama", **changes: Any) -> PeftModel:
    """Adapted with descriptions; learned parts that start at zero are moved."""
    settings = {"tasks": DESCRIPTIONS, "task_embedding": sources, "text_encoder": letters} | changes
    model = adapted_model(architecture, **settings)
    weight = table(model).weight
    if weight is not None:
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    return model


def table(model: PeftModel) -> Any:
    return network(model).task_embedding


def network(model: PeftModel) -> Any:
    return model.base_model.router.network("default")


def outputs(model: PeftModel, tasks: list[str]) -> list[Tensor]:
    return [logits(model, BATCH, tasks=task) for task in tasks]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("sources", ["text", "both", "learned", MIXED_SOURCES])
def test_a_saved_table_needs_no_encoder(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model(sources) if sources != "learned" else text_model(sources, text_encoder=None)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("hyperadapt.tasks.encoders.encode_texts", None)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert loaded.peft_config["default"].task_embedding == sources
    assert same(outputs(loaded, TASKS), outputs(model, TASKS))
    # Weights that lie in the file's memory are aligned otherwise, and summed in another order.
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=True)
    for task in TASKS:
        expected = logits(model, BATCH, tasks=task)
        assert torch.allclose(logits(loaded, BATCH, tasks=task), expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_a_fresh_process_needs_no_encoder(tmp_path: Path) -> None:
    model = text_model(MIXED_SOURCES)
    model.save_pretrained(tmp_path)
    code = """
import sys, torch, hyperadapt
from peft import PeftModel
from tests.support.helpers import base_model, example_batch
model = PeftModel.from_pretrained(base_model("llama"), sys.argv[1])
with torch.no_grad():
    outputs = model(**example_batch("llama", labels=False), tasks=["alpha", "beta", "gamma", "beta"])
torch.save(outputs.logits, sys.argv[2])
assert "sentence_transformers" not in sys.modules
"""
    run_python(code, tmp_path, tmp_path / "logits.pt")
    expected = logits(model, BATCH, tasks=["alpha", "beta", "gamma", "beta"])
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_sources_mix_in_one_batch() -> None:
    model = text_model(MIXED_SOURCES)
    mixed = logits(model, BATCH, tasks=["alpha", "beta", "gamma", "beta"])
    for row, task in enumerate(["alpha", "beta", "gamma", "beta"]):
        alone = logits(model, {name: value[row : row + 1] for name, value in BATCH.items()}, tasks=task)
        assert torch.allclose(mixed[row : row + 1], alone, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_text_tasks_train_through_the_projection() -> None:
    model = text_model(MIXED_SOURCES).train()
    model(**example_batch("llama"), tasks=["alpha", "beta", "gamma", "beta"]).loss.backward()
    assert table(model).text_projection.weight.grad.any()
    assert table(model).weight.grad[1].any()


def test_the_callers_configuration_stays(tmp_path: Path) -> None:
    config = adapter_config(
        tasks=DESCRIPTIONS, task_embedding="text", text_encoder=letters, target_modules="all-linear"
    )
    first, second = (get_peft_model(base_model("llama"), config) for _ in range(2))
    assert config.text_encoder is letters
    make_active(second).add_task("new", description=NEW, text_encoder=letters)
    assert config.tasks == TASKS == first.peft_config["default"].tasks
    assert second.peft_config["default"].text_embedding_dim == 26


def test_a_saved_configuration_alone_is_no_adapter(tmp_path: Path) -> None:
    text_model().save_pretrained(tmp_path)
    model = get_peft_model(base_model("llama"), HyperAdapterConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="has no vectors of its descriptions"):
        model(**BATCH, tasks="alpha")


def test_an_unusable_encoder_leaves_the_base_model_as_it_was() -> None:
    base = base_model("llama")
    names = [name for name, _ in base.named_modules()]
    config = adapter_config(
        tasks=DESCRIPTIONS, task_embedding="text", text_encoder=lambda texts: torch.ones(3), target_modules="all-linear"
    )
    with pytest.raises(ValueError, match=re.escape("gave a tensor of shape (3,) for 4 texts")):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names


def by_description(model: PeftModel) -> None:
    model.add_task("new", description=[NEW, "Which tongue?"], text_encoder=letters)


def by_embedding(model: PeftModel) -> None:
    model.add_task("new", embedding=torch.linspace(-1, 1, 8), description=NEW)


def by_interpolation(model: PeftModel) -> None:
    model.interpolate_tasks("new", {"alpha": 1, "gamma": 0.5})


@pytest.mark.parametrize("sources", ["text", "both", MIXED_SOURCES])
@pytest.mark.parametrize("add", [by_description, by_embedding, by_interpolation])
def test_new_tasks_leave_old_ones_alone(sources: Any, add: Callable[[PeftModel], None], tmp_path: Path) -> None:
    model = text_model(sources)
    before, trained = outputs(model, TASKS), trainable(model)
    add(model)
    assert same(outputs(model, TASKS), before)
    # A learned vector may be the table's first.
    assert trainable(model) - trained <= {"base_model.hyperadapter_networks.default.task_embedding.weight"}
    new = logits(model, BATCH, tasks="new")
    assert not any(torch.allclose(new, old, atol=1e-3) for old in before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert same(outputs(loaded, [*TASKS, "new"]), [*before, new])
    loaded.remove_task("new")
    assert same(outputs(loaded, TASKS), before)


def test_a_description_alone_is_what_training_would_have_seen() -> None:
    model, trained = text_model(), text_model(tasks=DESCRIPTIONS | {"new": NEW})
    model.add_task("new", description=NEW, text_encoder=letters)
    assert torch.equal(logits(model, BATCH, tasks="new"), logits(trained, BATCH, tasks="new"))
    embedding = model.embed_description(NEW, text_encoder=letters)
    assert torch.equal(logits(model, BATCH, task_embeddings=embedding), logits(model, BATCH, tasks="new"))


def test_sentence_transformers_model_end_to_end(tmp_path: Path) -> None:
    model = text_model(text_encoder=minilm())
    config = model.peft_config["default"]
    assert (config.text_encoder, config.text_embedding_dim) == (minilm(), 384)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    loaded.add_task("new", description="Decide whether a text message is spam.")
    embeddings = torch.nn.functional.normalize(table(loaded)(torch.arange(4)), dim=1)
    assert (embeddings[3] @ embeddings[:3].T).argmax() == TASKS.index("beta")


def test_only_the_direction_of_an_embedding_counts() -> None:
    model = text_model("learned", text_encoder=None)
    model.add_task("copy", embedding=table(model).weight[1] * 4)
    model.interpolate_tasks("same", {"beta": 0.25})
    expected = logits(model, BATCH, tasks="beta")
    for task in ("copy", "same"):
        assert torch.allclose(logits(model, BATCH, tasks=task), expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_that_cancel_leave_none(dtype: torch.dtype) -> None:
    model = text_model("learned", text_encoder=None)
    network(model).to(dtype)
    model.add_task("longer", embedding=table(model).weight[0] * 3)
    with pytest.raises(ValueError, match=re.escape("weights={'alpha': 1, 'longer': -1} cancel")):
        model.interpolate_tasks("none", {"alpha": 1, "longer": -1})
    model.interpolate_tasks("between", {"alpha": 1, "beta": -1})


def test_one_embedding_for_all_rows() -> None:
    model = text_model("learned", text_encoder=None)
    embedding = table(model).weight[1].detach()
    assert torch.equal(logits(model, BATCH, task_embeddings=embedding), logits(model, BATCH, tasks="beta"))
    with pytest.raises(ValueError, match=re.escape("shape (7,), but must have shape (batch, 8), or (8,) for all rows")):
        model(**BATCH, task_embeddings=embedding[:7])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e25])
def test_tiny_and_huge_embeddings_mean_the_same(scale: float) -> None:
    model = text_model()
    embedding = torch.randn(8, generator=torch.Generator().manual_seed(2))
    expected = logits(model, BATCH, task_embeddings=embedding)
    model.add_task("scaled", embedding=scale * embedding)
    for routing in ({"tasks": "scaled"}, {"task_embeddings": scale * embedding}):
        assert_close(logits(model, BATCH, **routing), expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    rows = torch.stack([embedding, scale * embedding])
    mixed = logits(model, {name: value[:2] for name, value in BATCH.items()}, task_embeddings=rows)
    assert_close(mixed, expected[:2], rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_only_the_ratios_of_weights_count(scale: float) -> None:
    model = text_model()
    model.interpolate_tasks("between", {"alpha": 1.0, "beta": 2.0})
    model.interpolate_tasks("scaled", {"alpha": scale, "beta": 2 * scale})
    first, second = outputs(model, ["between", "scaled"])
    assert_close(first, second, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_remove_and_rename() -> None:
    model = text_model(MIXED_SOURCES, default_task="beta")
    before = dict(zip(TASKS, outputs(model, TASKS), strict=True))
    model.set_task("beta")
    model.rename_task("beta", "delta")
    assert torch.equal(logits(model, BATCH), before["beta"])
    assert model.peft_config["default"].default_task == "delta"
    assert model.peft_config["default"].task_descriptions["delta"] == DESCRIPTIONS["beta"]
    model.remove_task("alpha")
    assert model.peft_config["default"].tasks == ["delta", "gamma"]
    assert same(outputs(model, ["delta", "gamma"]), [before["beta"], before["gamma"]])
    with pytest.raises(ValueError, match="Unknown task 'alpha'"):
        model(**BATCH, tasks="alpha")


def test_a_table_without_text_forgets_its_encoder() -> None:
    model = text_model({"alpha": "text", "beta": "learned", "gamma": "learned"})
    with pytest.warns(
        UserWarning, match="Task 'alpha' was the last one with descriptions, and what reads descriptions"
    ):
        model.remove_task("alpha")
    config = model.peft_config["default"]
    assert (config.task_embedding, config.text_encoder, config.text_embedding_dim) == ("learned", None, None)
    assert logits(model, BATCH, tasks="beta").isfinite().all()


def test_a_renamed_merged_task_stays_merged() -> None:
    model = text_model()
    model.set_task("beta")
    model.merge_adapter()
    merged = logits(model, BATCH)
    model.rename_task("beta", "delta")
    assert torch.equal(logits(model, BATCH, tasks="delta"), merged)
    with pytest.raises(ValueError, match="Task 'delta' cannot be removed: it is pinned; call set_task"):
        model.remove_task("delta")
    with pytest.raises(ValueError, match="Task 'delta' of adapter 'default' is merged"):
        model(**BATCH, tasks="alpha")


def test_models_can_be_copied_after_a_change() -> None:
    model = text_model(MIXED_SOURCES)
    model.add_task("new", description=NEW, text_encoder=letters)
    copied = copy.deepcopy(model)
    model.remove_task("new")
    assert same(outputs(copied, TASKS), outputs(model, TASKS))
    assert "new" in copied.peft_config["default"].tasks


EMBEDDING = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.add_task("new"), ValueError, "add_task('new') got nothing to go by"),
        (
            lambda m: m.add_task("new", examples=[{}], embedding=EMBEDDING),
            ValueError,
            "add_task('new') got both examples and an embedding",
        ),
        (
            lambda m: m.add_task("beta", embedding=EMBEDDING),
            ValueError,
            "There already is a task 'beta'. Choose another",
        ),
        (
            lambda m: m.add_task(" ", embedding=EMBEDDING),
            ValueError,
            "The name of a task is ' '; write a non-empty name",
        ),
        (lambda m: m.add_task(3, embedding=EMBEDDING), TypeError, "The name of a task must be a string, not 3 (int)"),
        (
            lambda m: m.add_task("new", description=""),
            ValueError,
            "The description of task 'new' is ''; write a non-empty",
        ),
        (
            lambda m: m.add_task("new", description=[]),
            ValueError,
            "The description of task 'new' is []; write a non-empty",
        ),
        (
            lambda m: m.add_task("new", description=NEW),
            ValueError,
            "'tests.support.helpers.letters', which a file",
        ),
        (
            lambda m: m.add_task("new", description=NEW, text_encoder=lambda texts: torch.ones(len(texts), 9)),
            ValueError,
            "gives vectors of size 9, but the adapter was made with 26",
        ),
        (
            lambda m: m.add_task("new", embedding=[1.0]),
            TypeError,
            "embedding is list, but must be a floating-point tensor",
        ),
        (
            lambda m: m.add_task("new", embedding=EMBEDDING.long()),
            TypeError,
            "embedding is a tensor of dtype torch.int64",
        ),
        (
            lambda m: m.add_task("new", embedding=torch.ones(1, 8)),
            ValueError,
            "embedding has shape (1, 8), but must have",
        ),
        (lambda m: m.add_task("new", embedding=0 * EMBEDDING), ValueError, "embedding is zero or not finite"),
        (lambda m: m.remove_task("none"), ValueError, "Unknown task 'none'"),
        (lambda m: m.remove_task("gamma"), ValueError, "Task 'gamma' cannot be removed: it is the default task; set"),
        (lambda m: m.rename_task("none", "new"), ValueError, "Unknown task 'none'"),
        (lambda m: m.rename_task("alpha", "beta"), ValueError, "There already is a task 'beta'"),
        (lambda m: m.interpolate_tasks("new", {}), ValueError, "interpolate_tasks('new') got no weights"),
        (lambda m: m.interpolate_tasks("new", {"none": 1.0}), ValueError, "Unknown task 'none'"),
        (lambda m: m.interpolate_tasks("new", {"alpha": "1"}), TypeError, "weights['alpha']='1' must be a number"),
        (
            lambda m: m.interpolate_tasks("new", {"alpha": torch.nan}),
            ValueError,
            "weights['alpha']=nan must be a finite",
        ),
        (lambda m: m.interpolate_tasks("new", {"alpha": 0.0}), ValueError, "weights={'alpha': 0.0} cancel"),
        (lambda m: m.interpolate_tasks("beta", {"alpha": 1.0}), ValueError, "There already is a task 'beta'"),
        (lambda m: m.embed_description(""), ValueError, "is ''; write a non-empty text"),
    ],
)
def test_bad_changes_are_refused(call: Callable[[PeftModel], None], error: type[Exception], message: str) -> None:
    model = text_model(MIXED_SOURCES, default_task="gamma")
    before, config = outputs(model, TASKS), model.peft_config["default"]
    with pytest.raises(error, match=re.escape(message)):
        call(model)
    assert model.peft_config["default"] is config
    assert same(outputs(model, TASKS), before)


def test_learned_adapters_know_no_text() -> None:
    model = text_model("learned", text_encoder=None)
    for call in (model.add_task, lambda name, description: model.embed_description(description)):
        with pytest.raises(ValueError, match=r"has no task with a description .* means nothing to it"):
            call("new", description=NEW)


def test_the_last_task_and_several_adapters() -> None:
    model = adapted_model("llama", tasks=["only"])
    with pytest.raises(ValueError, match="Task 'only' cannot be removed: it is the only task"):
        model.remove_task("only")
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=re.escape("One adapter must be active, but ['default', 'second'] are")):
        model.add_task("new", embedding=EMBEDDING)
    model.set_adapter("second")
    model.add_task("new", embedding=EMBEDDING)
    assert model.peft_config["second"].tasks == ["one", "two", "new"]
    assert model.peft_config["default"].tasks == TASKS
