"""What a training would do, told without training or writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperadapt.recipes import load_recipe
from hyperadapt.runs import predict, train
from hyperadapt.runs.preview import preview
from tests.support.tiny_runs import contents, recipe, training, write_recipe, write_rows

OF_AN_EPOCH = training(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=32, eval_strategy="no")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_it_says_what_the_training_then_does(tmp_path: Path, task_type: str) -> None:
    made = recipe(tmp_path, task_type, max_length=32, **OF_AN_EPOCH)
    before, lines = contents(tmp_path), []
    seen = preview(made, report=lines.append)
    assert contents(tmp_path) == before
    assert lines == ["reading the data of 3 tasks", f"loading the base model {tmp_path / 'base'}"]
    assert list(seen.tasks) == ["reviews", "letters", "mail"]
    assert all(task.rows == {"train": 40, "validation": 12, "test": 16} for task in seen.tasks.values())
    facts = train(made, report=None, figures=False).record.training
    for name in ("steps", "trainable_parameters", "parameters", "batch_size"):
        assert getattr(seen, name) == facts[name]
    assert (seen.folder, seen.task_type, seen.max_length) == (str(tmp_path / "run"), task_type, 32)
    assert len(seen.positions) == 7
    assert ("4 x dense" if task_type == "SEQ_CLS" else "1 x q_proj") in seen.modules


def test_the_first_row_is_shown_as_the_model_reads_it(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "SEQ_CLS", {"max_length": 32})
    write_rows(tmp_path / "data" / "mail" / "train.jsonl", [{"text": "a spam b", "label": "junk"}] * 3)
    write_rows(tmp_path / "data" / "mail" / "validation.jsonl", [{"text": "a " * 50, "label": "junk"}])
    write_rows(tmp_path / "data" / "mail" / "test.jsonl", [{"text": "ham", "label": "junk"}])
    mail = preview(load_recipe(path), report=None).tasks["mail"]
    assert mail.example == {"text": "[CLS] a spam b [SEP]", "label": "junk"}
    assert (mail.labels, mail.longest, mail.full) == (("junk",), 32, 1)


def test_prompt_and_completion_are_shown_as_they_are_split(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "CAUSAL_LM")
    chat = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "yes"}]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "mail" / f"{split}.jsonl", [{"messages": chat}])
    tasks = preview(load_recipe(path), report=None).tasks
    assert tasks["mail"].example == {"prompt": "user: good </s> assistant:", "completion": "yes </s>"}
    assert tasks["reviews"].example["prompt"].startswith("<s> ")
    assert tasks["reviews"].example["completion"].endswith(" </s>")
    assert tasks["mail"].labels == ()


def test_what_is_wrong_is_told_as_in_training(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(max_steps=1))
    write_rows(tmp_path / "data" / "mail" / "test.jsonl", [{"text": "a", "label": "other"}])
    with pytest.raises(ValueError, match="which is none of the task's labels"):
        preview(made, report=None)
    write_rows(tmp_path / "data" / "mail" / "test.jsonl", [{"text": "a", "label": "junk"}])
    train(made, report=None, figures=False)
    with pytest.raises(ValueError, match="holds a finished run"):
        preview(made, report=None)
    before = contents(tmp_path)
    assert preview(made, overwrite=True, report=None) == preview(made, resume=True, report=None)
    assert contents(tmp_path) == before


def test_rows_that_the_model_has_no_positions_for_are_cut(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "SEQ_CLS", {"max_length": 600, **training(max_steps=1, eval_strategy="no")})
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "mail" / f"{split}.jsonl", [{"text": "a " * 500, "label": "junk"}])
    seen = preview(load_recipe(path), report=None)
    assert (seen.max_length, seen.tasks["mail"].longest, seen.tasks["mail"].full) == (32, 32, 3)
    run = train(load_recipe(path), report=None, figures=False)
    assert predict(run, ["b " * 500], "mail")[0]["label"] == "junk"


def test_rows_that_fill_no_batch_are_not_all_dropped(tmp_path: Path) -> None:
    made = recipe(tmp_path, **training(dataloader_drop_last=True, per_device_train_batch_size=120))
    assert preview(made, report=None).steps == 10
    made = recipe(tmp_path, **training(dataloader_drop_last=True, per_device_train_batch_size=121))
    with pytest.raises(ValueError, match=r"drops all of the 120 rows to train on, which fill no batch of 121\."):
        preview(made, report=None)
