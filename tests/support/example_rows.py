"""Models whose tasks come from examples, and the rows for them."""

from typing import Any

from peft import PeftModel
from torch import Tensor

from tests.support.helpers import TASK_TYPES, TASKS, adapted_model, example_batch, letters

DESCRIPTIONS = {"alpha": "Find the topic.", "beta": "Is it spam?", "gamma": "Who wrote it?"}
MIXED_SOURCES = {"alpha": "text", "beta": "text+examples", "gamma": "examples"}


def batch_of(architecture: str, rows: int, seed: int = 3) -> dict[str, Tensor]:
    """A batch with labels; of a decoder with a prompt of three tokens."""
    batch = example_batch(architecture, rows, seed=seed)
    if TASK_TYPES[architecture] == "CAUSAL_LM":
        batch["labels"][:, :3] = -100
    return batch


def rows_of(architecture: str, rows: int = 8, seed: int = 3) -> list[dict[str, Tensor]]:
    batch = batch_of(architecture, rows, seed)
    return [{name: value[row] for name, value in batch.items()} for row in range(rows)]


def example_model(architecture: str = "llama", sources: Any = "examples", **changes: Any) -> PeftModel:
    """Adapted, without examples yet."""
    settings = {"task_embedding": sources, "task_type": TASK_TYPES[architecture]} | changes
    if "text" in str(sources) or sources == "both":
        settings = {"tasks": DESCRIPTIONS, "text_encoder": letters} | settings
    return adapted_model(architecture, **settings)


def with_examples(architecture: str = "llama", sources: Any = "examples", **changes: Any) -> PeftModel:
    """Adapted, with other examples for each task."""
    model = example_model(architecture, sources, **changes)
    kinds = model.peft_config["default"].task_sources
    model.set_examples(
        {name: rows_of(architecture, 8, seed) for seed, name in enumerate(TASKS) if "examples" in kinds[seed]}
    )
    return model
