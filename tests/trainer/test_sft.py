"""TRL's SFTTrainer on chats of several tasks: they are learned apart, or it refuses to start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskCollator, TaskTrainerMixin, concatenate_tasks
from tests.support.helpers import base_model
from tests.support.tolerances import FLOAT32_FORWARD

trl = pytest.importorskip("trl", reason="trl is not installed")

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

# The same question has another answer in each task, which the prompt does not tell.
ANSWERS = {"alpha": "red", "beta": "green", "gamma": "blue"}
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", "which", "colour", *ANSWERS.values()]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


class MultiTaskSFTTrainer(TaskTrainerMixin, trl.SFTTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def chats(answer: str) -> Dataset:
    prompt, completion = (
        [{"role": role, "content": text}] for role, text in (("user", "which colour"), ("assistant", answer))
    )
    return Dataset.from_list([{"prompt": prompt, "completion": completion}] * 8)


DATA = {task: chats(answer) for task, answer in ANSWERS.items()}


def options(kind: type[trl.SFTTrainer], folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 30,
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    # Each task is prepared by itself if it is given by itself.
    is_ours = kind is MultiTaskSFTTrainer and not changes.get("packing")
    return {
        "model": base_model("llama"),
        "args": trl.SFTConfig(**settings | changes),
        "train_dataset": DATA if is_ours else concatenate_tasks(DATA, list(ANSWERS)),
        "processing_class": tokenizer(),
        "peft_config": HyperAdapterConfig(task_type="CAUSAL_LM", tasks=list(ANSWERS), target_modules="all-linear", r=4),
    }


def assert_learned(trainer: trl.SFTTrainer) -> None:
    model, words = trainer.model.eval(), tokenizer()
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "which colour"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(
        input_ids=prompt.expand(3, -1),
        attention_mask=torch.ones_like(prompt).expand(3, -1),
        tasks=list(ANSWERS),
        max_new_tokens=1,
        do_sample=False,
    )
    assert words.batch_decode(output[:, -1:]) == list(ANSWERS.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_the_mixin(checkpointing: bool, tmp_path: Path) -> None:
    arguments = options(MultiTaskSFTTrainer, tmp_path, gradient_checkpointing=checkpointing, logging_steps=1)
    trainer = MultiTaskSFTTrainer(**arguments, eval_dataset=DATA, max_tasks_per_batch=1)
    trainer.train()
    assert_learned(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # With one task in a batch, its loss is the batch's.
    by_task = [[(key, value) for key, value in entry.items() if key.startswith("loss_")] for entry in logs]
    assert {key for [(key, _)] in by_task} == {f"loss_{task}" for task in ANSWERS}
    for entry, [(_, value)] in zip(logs, by_task, strict=True):
        assert_close(value, entry["loss"], rtol=FLOAT32_FORWARD, atol=0)
    metrics = trainer.evaluate()
    assert metrics["eval_mean_loss"] == sum(metrics[f"eval_{task}_loss"] for task in ANSWERS) / 3
    assert metrics["eval_mean_loss"] < logs[0]["loss"] / 2


def test_one_task_batches_need_no_rows(tmp_path: Path) -> None:
    arguments = options(MultiTaskSFTTrainer, tmp_path, padding_free=True, max_steps=45)
    trainer = MultiTaskSFTTrainer(**arguments, max_tasks_per_batch=1)
    trainer.train()
    assert_learned(trainer)


def test_with_a_collator(tmp_path: Path) -> None:
    arguments = options(trl.SFTTrainer, tmp_path, remove_unused_columns=False)
    trainer = trl.SFTTrainer(**arguments, data_collator=TaskCollator(DataCollatorForLanguageModeling(0)))
    trainer.train()
    assert_learned(trainer)


@pytest.mark.parametrize(
    ("kind", "changes", "collator", "message"),
    [
        (trl.SFTTrainer, {}, None, "trains 3 tasks, but this batch does not say which"),
        (trl.SFTTrainer, {"remove_unused_columns": False}, None, "trains 3 tasks, but this batch does not say which"),
        (trl.SFTTrainer, {}, TaskCollator, "Row 0 of the batch has no column 'tasks', only"),
        (
            trl.SFTTrainer,
            {"remove_unused_columns": False, "packing": True, "packing_strategy": "wrapped", "max_length": 16},
            TaskCollator,
            "Row 0 of the batch has no column 'tasks', only",
        ),
        (
            MultiTaskSFTTrainer,
            {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
            None,
            "The prepared training data has no column 'tasks' any more",
        ),
        (MultiTaskSFTTrainer, {"padding_free": True}, None, "Got tasks for 6 rows, but the batch has 1"),
    ],
)
def test_lost_tasks_are_refused(
    kind: type[trl.SFTTrainer], changes: dict[str, Any], collator: type | None, message: str, tmp_path: Path
) -> None:
    arguments = options(kind, tmp_path, **changes)
    if collator is not None:
        arguments["data_collator"] = collator(DataCollatorForLanguageModeling(0))
    trainer = kind(**arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
