"""Calls that cannot be right, and what each says."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from hyperadapt import export_lora, use_tasks
from tests.support.helpers import MIXED, ROWS, TASKS, adapted_model, adapter_config, example_batch, logits
from tests.support.tolerances import FLOAT32_FORWARD

BATCH = example_batch("llama", labels=False)
IDS = torch.tensor([TASKS.index(task) for task in MIXED])


@pytest.fixture(scope="module")
def shared() -> PeftModel:
    return adapted_model("llama", default_task="gamma")


def merged(model: PeftModel) -> PeftModel:
    model.set_task("beta")
    model.merge_adapter()
    return model


def enter_use_tasks(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with use_tasks(model, *args, **kwargs):
        pass


def forward(**routing: Any) -> Callable[[PeftModel], Any]:
    return lambda model: model(**BATCH, **routing)


OTHER_MERGED = "Task 'beta' of adapter 'default' is merged into the base weights, so no other task can be used."
BAD_CALLS = {
    "unknown name": (forward(tasks="delta"), ValueError, f"Unknown task 'delta'. Known tasks: {TASKS}."),
    "unknown name in a list": (
        forward(tasks=["alpha", "delta", "beta", "beta"]),
        ValueError,
        "Unknown task 'delta'.",
    ),
    "too many tasks": (
        forward(tasks=[*MIXED, "beta"]),
        ValueError,
        "Got tasks for 5 rows, but the batch has 4.",
    ),
    "too few ids": (forward(tasks=IDS[:3]), ValueError, "Got tasks for 3 rows, but the batch has 4."),
    "too many embeddings": (
        forward(task_embeddings=torch.ones(5, 8)),
        ValueError,
        "Got tasks for 5 rows, but the batch has 4.",
    ),
    "id too large": (
        forward(tasks=IDS + 1),
        ValueError,
        "Task id 3 in row 2 is out of range: there are 3 tasks",
    ),
    "negative id": (forward(tasks=IDS - 1), ValueError, "Task id -1 in row 1 is out of range"),
    "float ids": (forward(tasks=IDS.float()), TypeError, "tasks is a tensor of dtype torch.float32"),
    "bool ids": (forward(tasks=IDS > 0), TypeError, "tasks is a tensor of dtype torch.bool"),
    "2-D ids": (
        forward(tasks=IDS[None]),
        ValueError,
        "tasks is a tensor of shape (1, 4); task ids must have shape",
    ),
    "0-D id": (forward(tasks=IDS[0]), ValueError, "tasks is a tensor of shape (); task ids must have shape"),
    "list of ints": (
        forward(tasks=[0, 1, 2, 1]),
        TypeError,
        "A list of tasks must hold names, but holds 0 (int).",
    ),
    "one int": (forward(tasks=1), TypeError, "tasks=1 must be a task name, a list of names"),
    "a set": (forward(tasks={"alpha"}), TypeError, "tasks={'alpha'} must be a task name, a list of names"),
    "empty list": (forward(tasks=[]), ValueError, "tasks is empty; pass one task per row of the batch"),
    "both": (
        forward(tasks="beta", task_embeddings=torch.ones(4, 8)),
        ValueError,
        "Both tasks='beta' and task_embeddings of shape (4, 8) were given",
    ),
    "embedding size": (
        forward(task_embeddings=torch.ones(4, 7)),
        ValueError,
        "task_embeddings has shape (4, 7), but must have shape (batch, 8), or",
    ),
    "integer embeddings": (
        forward(task_embeddings=torch.ones(4, 8, dtype=torch.long)),
        TypeError,
        "task_embeddings has dtype torch.int64",
    ),
    "adapter_names": (
        forward(adapter_names=["default"] * 4),
        ValueError,
        "adapter_names=['default', 'default', 'default', 'default'] is not supported by hyperadapters",
    ),
    "pin unknown": (lambda model: model.set_task("delta"), ValueError, "Unknown task 'delta'."),
    "pin a list": (lambda model: model.set_task(MIXED), TypeError, f"set_task got {MIXED} (list)"),
    "use nothing": (enter_use_tasks, ValueError, "use_tasks got tasks=None and no task_embeddings"),
    "use unknown": (lambda model: enter_use_tasks(model, "delta"), ValueError, "Unknown task 'delta'."),
    "use both": (
        lambda model: enter_use_tasks(model, "beta", task_embeddings=torch.ones(4, 8)),
        ValueError,
        "Both tasks='beta' and task_embeddings",
    ),
    "use on a base model": (
        lambda _: enter_use_tasks(nn.Linear(2, 2), "beta"),
        TypeError,
        "Linear has no hyperadapter. Make one with get_peft_model",
    ),
    "export a base model": (
        lambda _: export_lora(nn.Linear(2, 2), "beta", "unused"),
        TypeError,
        "Linear has no hyperadapter.",
    ),
    "mixed while merged": (lambda model: forward(tasks=MIXED)(merged(model)), ValueError, OTHER_MERGED),
    "another while merged": (lambda model: forward(tasks="alpha")(merged(model)), ValueError, OTHER_MERGED),
    "embeddings while merged": (
        lambda model: forward(task_embeddings=torch.ones(4, 8))(merged(model)),
        ValueError,
        OTHER_MERGED,
    ),
    "pin while merged": (
        lambda model: merged(model).set_task("alpha"),
        ValueError,
        "Task 'beta' of adapter 'default' is merged into the base weights, so 'alpha' cannot be pinned.",
    ),
    "unpin while merged": (
        lambda model: merged(model).set_task(None),
        ValueError,
        "so None cannot be pinned.",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(shared: PeftModel, case: str) -> None:
    function, error, message = BAD_CALLS[case]
    model = copy.deepcopy(shared) if "merged" in case else shared
    with pytest.raises(error, match=re.escape(message)):
        function(model)
    if "merged" not in case:
        assert shared.base_model.router.pinned == {}
        assert shared.base_model.router.asked is None


def test_the_merged_task_may_be_asked_for(shared: PeftModel) -> None:
    expected = logits(shared, BATCH, tasks="beta")
    model = merged(copy.deepcopy(shared))
    model.set_task("beta")
    for tasks in ("beta", ["beta"] * ROWS, torch.ones(ROWS, dtype=torch.long)):
        assert_close(logits(model, BATCH, tasks=tasks), expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    with pytest.raises(ValueError, match="Got tasks for 3 rows, but the batch has 4"):
        model(**BATCH, tasks=["beta"] * 3)


@pytest.mark.parametrize(
    ("name", "meant"), [("task", "tasks"), ("task_ids", "tasks"), ("task_embedding", "task_embeddings")]
)
def test_a_misspelled_argument_is_not_ignored(shared: PeftModel, name: str, meant: str) -> None:
    for call in (shared, shared.generate):
        with pytest.raises(TypeError, match=f"{name}='beta' is no argument of the model. Did you mean {meant}=?"):
            call(**BATCH, **{name: "beta"})


def test_task_ids_are_refused_where_peft_would_drop_them() -> None:
    model = adapted_model("llama", default_task="gamma", task_type="CAUSAL_LM")
    with pytest.raises(
        TypeError, match=re.escape("task_ids=['beta'] is no argument of the model. Did you mean tasks=?")
    ):
        model(**BATCH, task_ids=["beta"])
    assert_close(logits(model, BATCH, task_ids=None, tasks="gamma"), logits(model, BATCH, tasks="gamma"))


def test_an_argument_of_the_base_model_keeps_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, task: float = 0.0) -> torch.Tensor:
            out: torch.Tensor = self.linear(x) + task
            return out

    model = get_peft_model(Named(), adapter_config(target_modules=["linear"]))
    x = torch.ones(2, 4)
    assert_close(model(x, task=1.0, tasks="beta"), model(x, tasks="beta") + 1)
