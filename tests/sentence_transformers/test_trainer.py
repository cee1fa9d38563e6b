"""Data sets of several tasks and losses train each text's own task, and runs are resumed exactly."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.testing import assert_close

from hyperadapt.sentence_transformers import MultiTaskSentenceTransformerTrainer
from hyperadapt.trainer import concatenate_tasks
from tests.support.embedding_models import adapted, plain
from tests.support.helpers import adapter_parameters
from tests.support.tolerances import FLOAT32_TRAINED

NAMES = ["query", "document", "same"]
COLOURS = ["red", "green", "blue"]
MAPPING = {"answers": {"question": "query", "answer": "document"}}

# TrainingArguments of transformers 5.23 say so of a name that sentence-transformers 6.2 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def answers(count: int = 6) -> Dataset:
    return Dataset.from_list(
        [{"question": f"which {COLOURS[i % 3]}", "answer": f"{COLOURS[i % 3]} {COLOURS[i // 3]}"} for i in range(count)]
    )


def pairs(count: int = 6) -> Dataset:
    return Dataset.from_list(
        [{"a": f"{COLOURS[i % 3]} red", "b": f"blue {COLOURS[i // 3]}", "score": float(i % 2)} for i in range(count)]
    )


def settings(folder: Path, **changes: Any) -> SentenceTransformerTrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return SentenceTransformerTrainingArguments(str(folder), **options | changes)


def losses_of(model: SentenceTransformer) -> dict[str, nn.Module]:
    return {"answers": MultipleNegativesRankingLoss(model), "same": CoSENTLoss(model)}


def make(base: str, folder: Path, data: Any, loss: Any = CoSENTLoss, **changes: Any) -> Any:
    model = adapted(base, NAMES)
    return MultiTaskSentenceTransformerTrainer(model, settings(folder, **changes), data, loss=loss(model))


def learned(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in adapter_parameters(trainer.model).items()}


def mixed_rows(count: int = 8) -> Dataset:
    halves = {name: pairs(count).select(range(start, count, 2)) for start, name in enumerate(("same", "query"))}
    return concatenate_tasks(halves, NAMES)


def test_columns_and_data_sets_have_tasks_and_losses_of_their_own(base: str, tmp_path: Path) -> None:
    """As the hyperadapter trains them with the tasks named in each call."""
    data = {"answers": answers(2), "same": pairs(2)}
    one = make(base, tmp_path, data, losses_of, router_mapping=MAPPING, max_steps=2, optim="sgd", max_grad_norm=0.0)
    one.train()
    other = adapted(base, NAMES)
    start = {name: value.detach().clone() for name, value in adapter_parameters(other).items()}
    expected, optimizer = losses_of(other), torch.optim.SGD(other.parameters(), 1e-2)
    logged = [entry for entry in one.state.log_history if "loss" in entry]
    for entry in logged:
        name = "answers" if "loss_answers" in entry else "same"
        columns = {"answers": {"question": "query", "answer": "document"}, "same": {"a": "same", "b": "same"}}[name]
        features = [other.preprocess(data[name].with_format(None)[one][:], tasks=task) for one, task in columns.items()]
        labels = torch.tensor(data[name].with_format(None)["score"][:]) if name == "same" else None
        loss = expected[name](features, labels)
        assert_close(entry[f"loss_{name}"], loss.item(), rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {name for entry in logged for name in entry if name.startswith("loss_")} == {"loss_answers", "loss_same"}
    trained = learned(one)
    for name, value in adapter_parameters(other).items():
        assert_close(trained[name], value.detach(), rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in trained.items())


def test_one_task_is_trained_as_it_is_pinned(base: str, tmp_path: Path) -> None:
    one = make(base, tmp_path, {"same": pairs()})
    one.train()
    model = adapted(base, NAMES)
    model.transformers_model.set_task("same")
    other = SentenceTransformerTrainer(model, settings(tmp_path), {"same": pairs()}, loss=CoSENTLoss(model))
    other.train()
    expected = learned(other)
    for name, value in learned(one).items():
        assert_close(value, expected[name], rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)


@pytest.mark.parametrize("form", ["ids", "names"])
def test_rows_with_tasks_make_mixed_batches(base: str, tmp_path: Path, form: str) -> None:
    data = mixed_rows()
    if form == "names":
        names = [NAMES[task] for task in data["tasks"]]
        data = data.remove_columns("tasks").add_column("tasks", names)
    trainer = make(base, tmp_path, data, per_device_train_batch_size=8, max_steps=1)
    [batch] = list(trainer.get_train_dataloader())
    assert sorted(batch["a_tasks"].tolist()) == [0] * 4 + [2] * 4
    assert torch.equal(batch["a_tasks"], batch["b_tasks"])
    trainer.train()
    model = adapted(base, NAMES)
    rows = trainer.train_dataset
    tasks = torch.tensor(rows["tasks"][:])
    features = [model.preprocess(rows[column][:], tasks=tasks) for column in ("a", "b")]
    expected = CoSENTLoss(model)(features, torch.tensor(rows["score"][:]))
    assert_close(trainer.state.log_history[0]["loss"], expected.item(), rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)


def test_a_loss_that_cuts_batches_keeps_the_tasks_of_rows(base: str) -> None:
    model = adapted(base, NAMES)
    tasks = [*NAMES, "query"]
    features = [
        model.preprocess(["red", "green blue", "blue", "red red"], tasks=order) for order in (tasks, tasks[::-1])
    ]
    whole = MultipleNegativesRankingLoss(model)([dict(one) for one in features], None)
    cut = CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)([dict(one) for one in features], None)
    assert_close(cut.item(), whole.item(), rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)


@pytest.mark.parametrize("form", ["dict", "mixed"])
def test_a_resumed_run_equals_a_whole_one(base: str, tmp_path: Path, form: str) -> None:
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    if form == "dict":
        # Two epochs of three batches.
        data, loss = {"answers": answers(2), "same": pairs(4)}, losses_of
        changes["router_mapping"] = MAPPING
    else:
        data, loss = mixed_rows(6), CoSENTLoss
    whole = make(base, tmp_path / "whole", data, loss, **changes)
    whole.train()
    resumed = make(base, tmp_path / "resumed", data, loss, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected = learned(whole)
    assert all(torch.equal(value, expected[name]) for name, value in learned(resumed).items())
    assert resumed.state.global_step == 6
    assert not list((tmp_path / "whole").glob(".unfinished*"))
    loaded = SentenceTransformer(str(tmp_path / "whole" / "checkpoint-6"), device="cpu")
    assert (loaded.encode("red", tasks="same") == whole.model.encode("red", tasks="same")).all()


def test_evaluation_uses_the_same_tasks(base: str, tmp_path: Path) -> None:
    model = adapted(base, NAMES)
    data = {"same": pairs()}
    trainer = MultiTaskSentenceTransformerTrainer(
        model, settings(tmp_path, per_device_eval_batch_size=8), data, data, loss={"same": CoSENTLoss(model)}
    )
    with torch.no_grad():
        features = [model.preprocess(pairs()[column][:], tasks="same") for column in ("a", "b")]
        expected = CoSENTLoss(model)(features, torch.tensor(pairs()["score"][:]))
    assert_close(trainer.evaluate()["eval_same_loss"], expected.item(), rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)


def tasks_seen(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tasks of the columns that the model gets from now on."""
    seen: list[Any] = []
    forward = model[0].forward

    def record(features: dict[str, Any], **kwargs: Any) -> Any:
        tasks = features["tasks"]
        seen.append(tasks if isinstance(tasks, str) else tasks.tolist())
        return forward(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", record)
    return seen


FLAT = {"router_mapping": {"question": "query", "answer": "document", "a": "same", "b": "query"}}
ROWS = {"router_mapping": {"question": "query", "answer": "document"}}
SIDES: dict[str, tuple[Any, Any, dict[str, Any], list[Any], list[Any]]] = {
    "other columns": (
        lambda: {"same": answers(2)},
        lambda: {"same": pairs(2)},
        {},
        ["same", "same"],
        ["same", "same"],
    ),
    "one to evaluate": (
        lambda: {"same": answers(2)},
        lambda: pairs(2),
        FLAT,
        ["query", "document"],
        ["same", "query"],
    ),
    "one to train": (
        lambda: answers(2),
        lambda: {"same": pairs(2)},
        FLAT,
        ["query", "document"],
        ["same", "query"],
    ),
    "a column called as a data set": (
        lambda: {"same": answers(2)},
        lambda: answers(2).rename_column("question", "same"),
        {"router_mapping": {"question": "query", "same": "query", "answer": "document"}},
        ["query", "document"],
        ["query", "document"],
    ),
    "rows beside it": (lambda: {"same": answers(2)}, lambda: mixed_rows(2), ROWS, ["query", "document"], [[2, 0]] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_training_and_evaluation_have_columns_of_their_own(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train, evaluation, changes, *expected = SIDES[name]
    model = adapted(base, NAMES)
    seen = tasks_seen(model, monkeypatch)
    arguments = settings(tmp_path, max_steps=1, **changes)
    loss = MultipleNegativesRankingLoss(model)
    trainer = MultiTaskSentenceTransformerTrainer(model, arguments, train(), evaluation(), loss=loss)
    for run, tasks in zip((trainer.train, trainer.evaluate), expected, strict=True):
        seen.clear()
        run()
        assert seen == tasks


@pytest.mark.parametrize("side", ["training", "evaluation"])
def test_rows_with_tasks_on_one_side_are_refused(base: str, tmp_path: Path, side: str) -> None:
    data = [{"same": pairs(2)}, {"same": mixed_rows(2)}]
    model = adapted(base, NAMES)
    message = (
        r"data set 'same' has a column 'tasks' in only one of training and evaluation, so that the task of its columns "
        r"\['a', 'b'\] is not known for both. Give both a column 'tasks', name"
    )
    with pytest.raises(ValueError, match=message):
        MultiTaskSentenceTransformerTrainer(model, settings(tmp_path), *data[:: -1 if side == "training" else 1])
    # All columns have a task that the rows do not change.
    mapping = {"router_mapping": {"a": "same", "b": "query"}}
    MultiTaskSentenceTransformerTrainer(model, settings(tmp_path, **mapping), *data)


BAD_DATA: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no task": (
        {"answers": answers()},
        {},
        r"column 'question' of data set 'answers' has no task. Name it with router_mapping="
        r"\{'answers': \{'question': 'query'\}\} of the training arguments, call the data set by",
    ),
    "one column": (
        {"answers": answers()},
        {"router_mapping": {"question": "query"}},
        "column 'answer' of data set 'answers' has no task",
    ),
    "one data set": (pairs(), {}, r"column 'a' of the data set has no task. Name it with router_mapping=\{'a': "),
    "unknown": (
        {"same": pairs()},
        {"router_mapping": {"same": {"a": "delta"}}},
        r"gives columns of data set 'same' the tasks \{'a': 'delta'\}, but the known ones are",
    ),
    "unknown row": (pairs(2).add_column("tasks", ["same", "delta"]), {}, "Unknown task 'delta'"),
    "id out of range": (pairs(2).add_column("tasks", [0, 3]), {}, "Task id 3 in row 1 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_without_known_tasks_is_refused(base: str, tmp_path: Path, name: str) -> None:
    data, changes, message = BAD_DATA[name]
    with pytest.raises(ValueError, match=message):
        make(base, tmp_path, data, **changes)


def test_models_without_tasks_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model is a SentenceTransformer without a hyperadapter.*add_hyperadapter"):
        MultiTaskSentenceTransformerTrainer(plain(base), settings(tmp_path), {"same": pairs()})
    with pytest.raises(TypeError, match="model is a NoneType without a hyperadapter"):
        MultiTaskSentenceTransformerTrainer(model_init=lambda: adapted(base))
