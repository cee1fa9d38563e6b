"""Fine-tune one hyperadapter on several tasks, each a folder of files with prompts and completions."""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskTrainerMixin


class MultiTaskSFTTrainer(TaskTrainerMixin, SFTTrainer):
    """SFTTrainer that takes a data set per task."""


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="Qwen/Qwen2.5-0.5B", help="path or name of the base model")
    parser.add_argument("--data_path", default=".", help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of the tasks")
    parser.add_argument("--output_dir", default="hyperadapter", help="folder of the fine-tuned adapter")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--cutoff_len", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--eval_step", type=int, default=10, help="steps between two logs")
    parser.add_argument("--save_step", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--device", default="auto", help="auto, or cpu")
    parser.add_argument("--rank", type=int, default=8, help="rank of each task's LoRA")
    parser.add_argument("--lora_alpha", type=float, default=8)
    parser.add_argument("--normalization", default="soft_polar", help="how each update is normalised")
    parser.add_argument("--target_modules", default="all-linear", help="module names with commas between them")
    parser.add_argument("--hub_model_id", help="name of the repository on the Hub")
    parser.add_argument("--push_to_hub", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, save, and push if asked to."""
    options = _parse_options()
    modules = options.target_modules
    config = HyperAdapterConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.lora_alpha,
        target_modules=modules if modules == "all-linear" else modules.split(","),
        tasks=options.tasks,
        normalization=options.normalization,
    )
    is_bf16 = options.device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    base = AutoModelForCausalLM.from_pretrained(options.base_model, dtype=torch.bfloat16 if is_bf16 else torch.float32)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    rows = {task: load_dataset(f"{options.data_path}/{task}", split="train") for task in options.tasks}
    columns = {task: part.select_columns(["prompt", "completion"]) for task, part in rows.items()}
    arguments = SFTConfig(
        output_dir=options.output_dir,
        num_train_epochs=options.num_epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        max_length=options.cutoff_len,
        logging_steps=options.eval_step,
        save_steps=options.save_step,
        use_cpu=options.device == "cpu",
        bf16=is_bf16,
        report_to="none",
    )
    MultiTaskSFTTrainer(model, arguments, train_dataset=columns, processing_class=tokenizer).train()
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    if options.push_to_hub:
        model.push_to_hub(options.hub_model_id)


if __name__ == "__main__":
    main()
