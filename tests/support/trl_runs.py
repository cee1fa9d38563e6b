"""Short runs of TRL's trainers on tiny models, whose words and answers tell the task."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from hyperadapt.trainer import TaskTrainerMixin
from tests.support.helpers import TASKS, adapted_model, adapter_config, base_model, make_active

# The first word of a prompt tells its task.
WORDS = ["<pad>", "<s>", "</s>", *TASKS, "which", "red", "green", "blue"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(kind: str, count: int = 4) -> dict[str, Dataset]:
    columns: dict[str, dict[str, Any]] = {
        "pairs": {"chosen": " red red </s>", "rejected": " blue </s>"},
        "marked": {"completion": " red green </s>", "label": True},
        "prompts": {},
        "completions": {"completion": " red </s>"},
    }
    return {
        task: Dataset.from_list([{"prompt": f"{task} which", **columns[kind]}] * (count + index))
        for index, task in enumerate(TASKS)
    }


def settings(kind: type, folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 2,
        # What the model was called with can then be computed after the fact.
        "learning_rate": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return kind(**options | changes)


def multi(kind: type) -> Any:
    return type(f"Multi{kind.__name__}", (TaskTrainerMixin, kind), {})


def policy(task_type: str = "CAUSAL_LM") -> PeftModel:
    if task_type == "CAUSAL_LM":
        return adapted_model("llama", task_type=task_type)
    torch.manual_seed(0)
    config = base_model("llama").config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    return make_active(get_peft_model(model, adapter_config(target_modules="all-linear", task_type=task_type)))
