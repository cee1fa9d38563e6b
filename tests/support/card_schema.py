"""What the Hub asks of a model card's metadata, checked without the Hub.

The rules are those of the Hub's documentation of model cards and of its metadata specification.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from examples.support.keep_card import without_pictures

ROOT = Path(__file__).resolve().parents[2]


def _is_repo_id(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    validate_repo_id(value)
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)


RULES: dict[str, Callable[[Any], bool]] = {
    "base_model": _is_repo_id,
    "base_model_relation": lambda value: value in ("adapter", "finetune", "merge", "quantized"),
    "library_name": lambda value: value in ("hyperadapt", "peft", "diffusers", "mlx"),
    "license": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9.-]+", value) is not None,
    "language": lambda value: all(
        re.fullmatch(r"[a-z]{2,3}", one) for one in ([value] if isinstance(value, str) else value)
    ),
    "pipeline_tag": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z-]+", value) is not None,
    "tags": _are_names,
    "datasets": lambda value: _are_names(value) and all(map(_is_repo_id, value)),
    "metrics": _are_names,
    "widget": lambda value: isinstance(value, list) and all(("text" in one) != ("messages" in one) for one in value),
    "model-index": lambda value: isinstance(value, list),
}
REQUIRED = ("library_name", "tags")


def check_card(card: ModelCard) -> None:
    """Assert that a card's metadata are valid and complete."""
    data = yaml.safe_load(card.content.split("---")[1])
    for name in REQUIRED:
        assert name in data, f"{name} is missing"
    for name, value in data.items():
        assert name in RULES, f"{name} is unknown"
        assert RULES[name](value), f"{name} is {value!r}"
    assert "hyperadapt" in data["tags"]
    assert ("base_model" in data) == ("base_model_relation" in data)
    for entry in data.get("model-index", []):
        assert isinstance(entry["name"], str)
        for result in entry["results"]:
            assert result["task"]["type"]
            assert result["dataset"]["name"]
            assert result["dataset"]["type"]
            for metric in result["metrics"]:
                assert metric["type"]
                assert isinstance(metric["value"], int | float)


def python_code(text: str) -> list[str]:
    """The blocks of Python in a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def check_example_card(folder: Path, name: str) -> None:
    """Assert that an example's card is valid, and that its code runs as it is written and is that of the kept card.

    Args:
        folder: The adapter's folder, relative to the working directory as the example's own default is.
        name: Name of the kept card.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    check_card(ModelCard(text))
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", text, re.MULTILINE)
    assert pictures
    assert all((folder / picture).is_file() for picture in pictures)
    assert "![" not in without_pictures(text)
    [code] = python_code(text)
    exec(compile(code, str(folder / "README.md"), "exec"), {})
    kept = (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert python_code(kept) == [code]
    assert re.findall(r"^#.*", kept, re.MULTILINE) == re.findall(r"^#.*", text, re.MULTILINE)
