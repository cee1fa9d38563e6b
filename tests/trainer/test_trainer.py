"""Training many tasks through Trainer: what is logged by task, and the task column cannot be lost unnoticed."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.testing import assert_close
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hyperadapt.trainer import HyperAdapterTrainer, TaskCollator, TaskTrainerMixin, concatenate_tasks
from tests.support.helpers import TASKS, adapted_model, base_model, example_batch
from tests.support.tolerances import FLOAT32_FORWARD


def task_rows(name: str, count: int, seed: int) -> Dataset:
    batch = example_batch(name, rows=count, seed=seed)
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()} | {"unused": list(range(count))})


def data(name: str) -> dict[str, Dataset]:
    return {task: task_rows(name, 4 * (index + 1), seed=index) for index, task in enumerate(TASKS)}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**options | changes)


def record(model: PeftModel) -> list[dict[str, Any]]:
    """The batches that the model will have been called with."""
    batches: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    return batches


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_losses_by_task(name: str, tmp_path: Path) -> None:
    model = adapted_model(name)
    batches = record(model)
    # At a rate of zero, the losses can be computed after the fact.
    trainer = HyperAdapterTrainer(model, arguments(tmp_path, learning_rate=0.0), train_dataset=data(name))
    trainer.train()
    model.eval()
    batches, logs = list(batches), [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(batches) == 4
    for entry, pair in zip(logs, (batches[:2], batches[2:]), strict=True):
        columns = {key: torch.cat([batch[key] for batch in pair]) for key in ("tasks", *example_batch(name))}
        ids = columns.pop("tasks")
        assert len(ids) == 12
        assert {key for key in entry if key.startswith("loss_")} == {f"loss_{TASKS[task]}" for task in ids.unique()}
        for task in ids.unique():
            alone = {key: value[ids == task] for key, value in columns.items()}
            with torch.no_grad():
                expected = model(**alone, tasks=TASKS[task]).loss.item()
            assert_close(entry[f"loss_{TASKS[task]}"], expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


def test_losses_by_task_can_be_left_out(tmp_path: Path) -> None:
    options = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = HyperAdapterTrainer(adapted_model("bert"), options, train_dataset=data("bert"), log_task_losses=False)
    trainer.train()
    assert not any(key.startswith("loss_") for entry in trainer.state.log_history for key in entry)
    smoothed = HyperAdapterTrainer(adapted_model("bert"), options, train_dataset=data("bert"))
    smoothed.train()
    assert any(key.startswith("loss_") for entry in smoothed.state.log_history for key in entry)


def test_a_collator_that_carries_tasks_is_taken_as_it_is(tmp_path: Path) -> None:
    collator = TaskCollator(default_data_collator)
    model = adapted_model("bert")
    batches = record(model)
    trainer = HyperAdapterTrainer(model, arguments(tmp_path), collator, data("bert"))
    trainer.train()
    assert trainer.data_collator is collator
    assert all(len(batch["tasks"]) == 6 for batch in batches)


@pytest.mark.parametrize("limit", [1, 2])
def test_batches_are_drawn_by_task(limit: int, tmp_path: Path) -> None:
    model = adapted_model("bert")
    batches = record(model)
    options = arguments(tmp_path, max_steps=-1, num_train_epochs=4)
    trainer = HyperAdapterTrainer(
        model, options, train_dataset=data("bert"), temperature=1e6, max_tasks_per_batch=limit
    )
    trainer.train()
    # One task is passed by name.
    ids = [torch.tensor(TASKS.index(t)).expand(6) if isinstance(t := batch["tasks"], str) else t for batch in batches]
    assert max(len(batch.unique()) for batch in ids) == limit
    counts = torch.cat(ids).bincount()
    # The sizes are 4, 8 and 12, but the tasks are alike at this temperature, to one unit each epoch.
    assert counts.max() - counts.min() <= 4 * 6 // limit
    order = [batch["input_ids"].tolist() for batch in batches]
    assert order[: len(order) // 4] != order[len(order) // 4 : len(order) // 2]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_by_task_and_the_best_model_on_the_mean(tmp_path: Path) -> None:
    model = adapted_model("bert")
    options = arguments(
        tmp_path,
        max_steps=8,
        learning_rate=5e-2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="mean_accuracy",
        greater_is_better=True,
    )
    trainer = HyperAdapterTrainer(
        model, options, train_dataset=data("bert"), eval_dataset=data("bert"), compute_metrics=accuracy
    )
    trainer.train()
    history = trainer.state.log_history
    means = {entry["step"]: entry["eval_mean_accuracy"] for entry in history if "eval_mean_accuracy" in entry}
    assert list(means) == [2, 4, 6, 8]
    for step, mean in means.items():
        single = [
            entry[f"eval_{t}_accuracy"]
            for t in TASKS
            for entry in history
            if f"eval_{t}_accuracy" in entry and entry["step"] == step
        ]
        assert len(single) == 3
        assert math.isclose(mean, sum(single) / 3)
    best = max(means, key=lambda step: (means[step], -step))
    assert trainer.state.best_metric == means[best]
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    final = trainer.evaluate()
    assert final["eval_mean_accuracy"] == means[best]
    assert "eval_mean_runtime" not in final
    # Also for data that the trainer was not made with.
    other = trainer.evaluate({"beta": data("bert")["beta"]}, metric_key_prefix="test")
    assert other["test_mean_loss"] == other["test_beta_loss"] == final["eval_beta_loss"]


@pytest.mark.parametrize("limit", [None, 2])
def test_predictions_of_a_dict_are_those_of_its_tasks(limit: int | None, tmp_path: Path) -> None:
    options = arguments(tmp_path, per_device_eval_batch_size=5)
    model = adapted_model("bert")
    trainer = HyperAdapterTrainer(model, options, compute_metrics=accuracy, max_tasks_per_batch=limit)
    prediction = trainer.predict(data("bert"))
    expected = []
    for task, rows in data("bert").items():
        batch = {name: torch.tensor(rows[name]) for name in rows.column_names if name not in ("unused", "labels")}
        with torch.no_grad():
            expected.append(model(**batch, tasks=task).logits)
    assert_close(torch.tensor(prediction.predictions), torch.cat(expected), rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    assert prediction.metrics["test_accuracy"] == accuracy(prediction)["accuracy"]
    assert trainer.predict(concatenated("bert")).metrics["test_accuracy"] == prediction.metrics["test_accuracy"]
    with pytest.raises(ValueError, match="test_dataset has no column 'tasks'"):
        trainer.predict(data("bert")["alpha"])


class MultiTaskSeq2SeqTrainer(TaskTrainerMixin, Seq2SeqTrainer):
    pass


def test_what_is_generated_with_reaches_each_task(tmp_path: Path) -> None:
    lengths: list[int] = []

    def length(prediction: Any) -> dict[str, float]:
        lengths.append(int((prediction.predictions != -100).sum(1).max()))
        return {"length": lengths[-1]}

    model = adapted_model("t5")
    options = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        per_device_eval_batch_size=12,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = MultiTaskSeq2SeqTrainer(model, options, eval_dataset=data("t5"), compute_metrics=length)
    seen: list[Any] = []
    generate = model.generate
    model.generate = lambda **kwargs: (seen.append((kwargs["max_length"], kwargs["num_beams"])), generate(**kwargs))[1]
    metrics = trainer.evaluate(max_length=5, num_beams=2)
    assert seen == [(5, 2)] * 3
    assert {f"eval_{task}_length" for task in (*TASKS, "mean")} <= metrics.keys()
    trainer.evaluate(data("t5"), max_length=4, num_beams=3)
    assert seen[3:] == [(4, 3)] * 3
    trainer.predict(data("t5"), max_length=6, num_beams=1)
    assert set(seen[6:]) == {(6, 1)}


def test_a_task_that_diverged_makes_no_best_model(tmp_path: Path) -> None:
    def broken(prediction: Any) -> dict[str, Any]:
        return {"score": math.nan, "kind": "text"}

    options = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="mean_score", greater_is_better=True
    )
    trainer = HyperAdapterTrainer(
        adapted_model("bert"), options, train_dataset=data("bert"), eval_dataset=data("bert"), compute_metrics=broken
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step is None
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_mean_score"])
    assert "eval_mean_kind" not in metrics


def test_early_stopping_on_the_mean(tmp_path: Path) -> None:
    options = arguments(
        tmp_path,
        max_steps=20,
        learning_rate=0.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_loss",
        greater_is_better=False,
    )
    callback = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = HyperAdapterTrainer(
        adapted_model("bert"), options, train_dataset=data("bert"), eval_dataset=data("bert"), callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_position_that_diverges_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted_model("bert", normalization="none")
    trainer = HyperAdapterTrainer(model, arguments(tmp_path), train_dataset=data("bert"), log_positions=True)
    network = model.base_model.router.network("default")
    names = [position.name for position in network.positions]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        for name in names:
            assert entry[f"update_norm/{name}"] > 0
            assert entry[f"grad_norm/{name}"] > 0
        assert not any(key.startswith("saturated_share") for key in entry)
    assert not caplog.records
    with torch.no_grad():
        network.base_norms[2] = 0.0
    logging.enable_propagation()
    try:
        trainer.train()
    finally:
        logging.disable_propagation()
    assert f"not finite at 1 of {len(names)} positions, the first of them {names[2]!r}" in caplog.text


def concatenated(name: str) -> Dataset:
    return concatenate_tasks(data(name), TASKS)


@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_trainer_works_or_refuses(wrapped: bool, tmp_path: Path) -> None:
    collator = TaskCollator(default_data_collator) if wrapped else default_data_collator
    message = (
        "Row 0 of the batch has no column 'tasks'" if wrapped else "trains 3 tasks, but this batch does not say which"
    )
    rows = concatenated("bert").remove_columns("unused")
    trainer = Trainer(adapted_model("bert"), arguments(tmp_path), collator, train_dataset=rows)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    model = adapted_model("bert")
    batches = record(model)
    Trainer(model, arguments(tmp_path, remove_unused_columns=False), collator, train_dataset=rows).train()
    assert all(len(batch["tasks"]) == 6 for batch in batches)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"train_dataset": data("bert")["alpha"]},
            ValueError,
            "train_dataset has no column 'tasks', only ['input_ids'",
        ),
        ({"train_dataset": [{"input_ids": [1]}]}, TypeError, "train_dataset is of type list, but must be"),
        ({"train_dataset": {"delta": data("bert")["alpha"]}}, ValueError, "Unknown task 'delta'"),
        (
            {"train_dataset": data("bert")["alpha"].add_column("tasks", ["alpha"] * 4)},
            ValueError,
            "The column 'tasks' of train_dataset is of type string, but must hold the ids of tasks",
        ),
        ({"eval_dataset": {"mean": data("bert")["alpha"]}}, ValueError, "eval_dataset has a task 'mean'"),
        ({"eval_dataset": {"delta": data("bert")["alpha"]}}, ValueError, "Unknown task 'delta'"),
        (
            {"model": None, "model_init": base_model},
            TypeError,
            "got model=None, but must know the tasks from the start",
        ),
        ({"model": base_model("bert")}, TypeError, "BertForSequenceClassification has no hyperadapter"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": adapted_model("bert"), "train_dataset": data("bert")}
    with pytest.raises(error, match=re.escape(message)):
        HyperAdapterTrainer(args=arguments(tmp_path), **options | changes)


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset)


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=2)


def test_batches_that_another_trainer_draws(tmp_path: Path) -> None:
    class MultiTaskOwnSampler(TaskTrainerMixin, OwnSampler):
        pass

    class MultiTaskOwnLoader(TaskTrainerMixin, OwnLoader):
        pass

    model, options = adapted_model("bert"), arguments(tmp_path)
    with pytest.raises(TypeError, match="MultiTaskOwnSampler draws rows with a SequentialSampler, whose order"):
        MultiTaskOwnSampler(model, options, train_dataset=data("bert")).train()
    MultiTaskOwnLoader(model, options, train_dataset=data("bert")).get_train_dataloader()
    trainer = MultiTaskOwnLoader(model, options, train_dataset=data("bert"), temperature=2.0)
    with pytest.raises(ValueError, match=r"MultiTaskOwnLoader draws its batches itself, so temperature=2\.0 and"):
        trainer.train()


def test_another_way_of_sampling_is_refused(tmp_path: Path) -> None:
    options = arguments(tmp_path)
    options.train_sampling_strategy = "group_by_length"
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' cannot be followed"):
        HyperAdapterTrainer(adapted_model("bert"), options, train_dataset=data("bert"))


def test_a_trainer_refuses_tasks_that_have_changed(tmp_path: Path) -> None:
    model = adapted_model("bert", task_type="SEQ_CLS")
    rows = data("bert")
    trainer = HyperAdapterTrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    model.rename_task("gamma", "third")
    message = (
        r"tasks of the model are \['alpha', 'beta', 'third'\] now, but were \['alpha', 'beta', 'gamma'\] when this"
    )
    for call in (trainer.train, trainer.evaluate, lambda: trainer.predict(rows)):
        with pytest.raises(ValueError, match=message):
            call()
    model.rename_task("third", "gamma")
    trainer.evaluate()
    model.add_own_factors("beta")
    with pytest.raises(
        ValueError, match=r"factors of their own are \['beta'\] now, but were None when this trainer was"
    ):
        trainer.train()


def test_batch_sizes_that_are_found_fit_no_limit_of_tasks(tmp_path: Path) -> None:
    options = arguments(tmp_path, auto_find_batch_size=True)
    with pytest.raises(
        ValueError, match="auto_find_batch_size=True may find a batch size that max_tasks_per_batch=2 does"
    ):
        HyperAdapterTrainer(adapted_model("bert"), options, train_dataset=data("bert"), max_tasks_per_batch=2)
