"""Adapt the fused experts of a mixture to three tasks: `python -m examples.mixture_of_experts`.

No mixture is small enough to be packaged with its weights, so this is a tiny Mixtral with random ones, and the tasks
are sums on numbers below 16. A real one takes the same lines, with from_pretrained in place of the configuration.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments, default_data_collator

from hyperadapt import HyperAdapterConfig, export_lora
from hyperadapt.trainer import HyperAdapterTrainer

NUMBERS, LENGTH = 16, 6
# Of each number in a row, a task asks for the number that is so much above it.
TASKS = {"next": 1, "previous": -1, "opposite": NUMBERS // 2}


def tiny_mixtral() -> MixtralForCausalLM:
    """Two layers of four experts each, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return MixtralForCausalLM(MixtralConfig(vocab_size=NUMBERS, **sizes, **heads, pad_token_id=None)).eval()


def rows(step: int, count: int, seed: int) -> Dataset:
    """Rows of numbers; a causal language model shifts labels itself, so a label stands one place later."""
    numbers = torch.randint(NUMBERS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    answers = torch.cat([torch.full((count, 1), -100), (numbers[:, :-1] + step) % NUMBERS], dim=1)
    return Dataset.from_dict({"input_ids": numbers.tolist(), "labels": answers.tolist()})


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, **routing: str) -> float:
    """Share of right answers."""
    numbers, answers = (torch.tensor(data[name]) for name in ("input_ids", "labels"))
    given = model(input_ids=numbers, **routing).logits[:, :-1].argmax(-1)
    return float((given == answers[:, 1:]).float().mean())


def main() -> None:
    """Train, compare, and load an export with plain PEFT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/mixture_of_experts"))
    options = parser.parse_args()
    started = time.monotonic()
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = HyperAdapterConfig(
        task_type="CAUSAL_LM", target_parameters=experts, target_modules=[], tasks=list(TASKS), normalization_bound=1.0
    )
    model = get_peft_model(tiny_mixtral(), config)
    arguments = TrainingArguments(
        str(options.output), max_steps=options.steps, per_device_train_batch_size=48, learning_rate=1e-2,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    train = {name: rows(step, 400, seed=1) for name, step in TASKS.items()}
    HyperAdapterTrainer(model, arguments, default_data_collator, train).train()
    model.eval()

    print(f"\n{'task':<12}{'base model':>12}{'hyperadapter':>14}{'its LoRA':>10}")
    for name, step in TASKS.items():
        test = rows(step, 100, seed=2)
        export_lora(model, name, options.output / name)
        lora = PeftModel.from_pretrained(tiny_mixtral(), options.output / name)
        scores = accuracy(tiny_mixtral(), test), accuracy(model, test, tasks=name), accuracy(lora, test)
        print(f"{name:<12}{scores[0]:>12.3f}{scores[1]:>14.3f}{scores[2]:>10.3f}")
    print(f"seconds: {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
