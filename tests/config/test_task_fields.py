"""Fields of the configuration that say where a task's embedding comes from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

from hyperadapt import HyperAdapterConfig
from tests.support.helpers import letters

TASKS = {"a": "first", "b": ["second", "the second one"]}


def test_sources_by_task() -> None:
    config = HyperAdapterConfig(tasks=TASKS, task_embedding={"b": "both", "a": "learned"}, text_encoder="encoder")
    assert config.tasks == ["a", "b"]
    assert config.task_sources == ["learned", "both"]
    assert config.embedded_descriptions == [[], ["second", "the second one"]]
    assert config.task_descriptions == TASKS
    assert HyperAdapterConfig(tasks=TASKS, task_embedding={"a": "learned", "b": "learned"}).task_embedding == "learned"


def test_examples_need_no_description() -> None:
    config = HyperAdapterConfig(tasks={"a": "first", "b": "second"}, task_embedding="examples")
    assert config.has_examples
    assert config.embedded_descriptions == [[], []]
    config = HyperAdapterConfig(tasks=TASKS, task_embedding={"a": "text+examples", "b": "learned"}, text_encoder="x")
    assert config.has_examples
    assert config.embedded_descriptions == [["first"], []]
    assert not HyperAdapterConfig(tasks=TASKS, task_embedding="both", text_encoder="x").has_examples


def test_replacing_tasks_leaves_the_original_alone() -> None:
    config = HyperAdapterConfig(tasks=TASKS, task_embedding="text", text_encoder="encoder")
    changed = config.replaced(tasks=["a", "c"], task_descriptions={"a": "first", "c": "third"})
    assert (config.tasks, changed.tasks) == (["a", "b"], ["a", "c"])
    assert config.task_descriptions == TASKS
    with pytest.raises(ValueError, match="needs a description of task 'c'"):
        config.replaced(tasks=["a", "c"], task_descriptions={"a": "first"})


@pytest.mark.parametrize("encoder", [letters, Path("some") / "folder", "name"])
def test_encoders_in_files(encoder: Any, tmp_path: Path) -> None:
    config = HyperAdapterConfig(tasks=TASKS, task_embedding="text", text_encoder=encoder)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["text_encoder"]
    assert saved == ("function:tests.support.helpers.letters" if encoder is letters else str(encoder))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.task_sources == ["text", "text"]
    assert loaded.embedded_descriptions == [["first"], ["second", "the second one"]]


TEXT = {"tasks": TASKS, "task_embedding": "text", "text_encoder": "encoder"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"task_embedding": 3},
            TypeError,
            "task_embedding=3 must be one of ('learned', 'text', 'both', 'examples', 'text+",
        ),
        ({"task_embedding": "words"}, ValueError, "task_embedding='words' is unknown. Choose one of 'learned', 'text'"),
        (
            {"tasks": TASKS, "task_embedding": {"a": "words", "b": "text"}},
            ValueError,
            "task_embedding='words' is unknown",
        ),
        (
            {"tasks": TASKS, "task_embedding": {"a": "learned"}},
            ValueError,
            "task_embedding={'a': 'learned'} gives no source for task 'b'",
        ),
        (
            {"tasks": ["a"], "task_embedding": {"a": "learned", "c": "text"}},
            ValueError,
            "task_embedding names 'c', which",
        ),
        (TEXT | {"tasks": ["a"]}, ValueError, "task_embedding='text' needs a description of task 'a'. Pass tasks as"),
        (TEXT | {"tasks": {"a": []}}, ValueError, "The description of task 'a' is []; write a non-empty text"),
        (
            TEXT | {"tasks": {"a": ["x", " "]}},
            ValueError,
            "The description of task 'a' is ['x', ' ']; write a non-empty",
        ),
        (TEXT | {"text_encoder": None}, ValueError, "task_embedding asks for text, but text_encoder is not given"),
        (TEXT | {"text_encoder": 3}, TypeError, "text_encoder=3 must be the name or folder of a sentence-transformers"),
        (TEXT | {"text_encoder_revision": 3}, TypeError, "text_encoder_revision=3 must be a string or None"),
        (TEXT | {"text_embedding_dim": 0}, ValueError, "text_embedding_dim=0 must be at least 1"),
        (
            TEXT | {"text_embedding_dim": 26, "conditioning": "bilinear"},
            ValueError,
            "conditioning='bilinear' compares activations of size task_embedding_dim=64 with the vectors of "
            "descriptions, which have size 26. Choose a text encoder of that size",
        ),
        (
            {"text_encoder": "encoder"},
            ValueError,
            "text_encoder='encoder' has no effect: no task's embedding takes text",
        ),
        (
            {"text_embedding_dim": 3},
            ValueError,
            "text_embedding_dim=3 has no effect: no task's embedding takes text",
        ),
        ({"example_dim": 8}, ValueError, "example_dim=8 has no effect: no task's embedding takes examples. Set"),
        ({"task_embedding": "examples", "example_dim": 0}, ValueError, "example_dim=0 must be at least 1"),
        ({"task_embedding": "examples", "example_classes": 2}, ValueError, "example_classes=2 is given without"),
        (
            {"task_embedding": "examples", "task_type": "TOKEN_CLS"},
            ValueError,
            "task_embedding asks for examples, which task_type='TOKEN_CLS' cannot have",
        ),
        (
            {"task_embedding": "examples", "task_type": "CAUSAL_LM", "example_dim": 8, "example_classes": 2},
            ValueError,
            "example_dim=8 with example_classes=2 does not fit task_type='CAUSAL_LM'",
        ),
        (
            {"task_embedding": "text+examples", "text_encoder": "encoder", "tasks": ["a"]},
            ValueError,
            "task_embedding='text+examples' needs a description of task 'a'",
        ),
    ],
)
def test_bad_conditions_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        HyperAdapterConfig(**arguments)


def test_lists_of_descriptions_are_copies() -> None:
    descriptions = ["one"]
    config = HyperAdapterConfig(target_modules="all-linear", tasks={"alpha": descriptions})
    descriptions.append("two")
    assert config.task_descriptions == {"alpha": ["one"]}


def test_attributes_make_an_equal_configuration() -> None:
    config = HyperAdapterConfig(tasks=TASKS, task_embedding="text", text_encoder="encoder")
    assert HyperAdapterConfig(**vars(config)) == config


def test_the_test_encoder_tells_texts_apart() -> None:
    vectors = letters(["ab", "ba", "cd"])
    assert vectors.shape == (3, 26)
    assert torch.linalg.matrix_rank(vectors) == 3
