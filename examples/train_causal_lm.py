"""Fine-tune a causal language model on nine tasks written as chats: `python -m examples.train_causal_lm --fast`.

TRL's SFTTrainer does the training, extended by ``TaskTrainerMixin``. Compared are exact matches of generated answers:
always the most frequent class, the base model with the same prompts, and the hyperadapter. With --fast it takes some
minutes on a CPU; without, use a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from datasets import concatenate_datasets
from trl import SFTConfig, SFTTrainer

from examples.support.cards import save_card
from examples.support.causal_lm import answers, chats, exact_matches, load_base, load_tokenizer
from examples.support.text_tasks import load_task
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskTrainerMixin

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent"),
    *("reuters_r8", "stereoset_rel", "trump_clinton", "bbc"),
)

USAGE = """\
import hyperadapt  # registers the method with PEFT
import torch
from examples.support.causal_lm import load_base, load_tokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(load_base(torch.bfloat16), "{folder}").eval()
tokenizer = load_tokenizer()
messages = [
    {{"role": "system", "content": "Tell spam from genuine text messages. Answer only with one of: not spam, spam."}},
    {{"role": "user", "content": "WINNER!! You have been selected for a prize. Call now."}},
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, tasks="sms_spam", max_new_tokens=8, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


class MultiTaskSFTTrainer(TaskTrainerMixin, SFTTrainer):
    """SFTTrainer that samples, logs and evaluates by task."""


def main() -> None:
    """Evaluate, train, evaluate again and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="few rows and steps, short texts")
    parser.add_argument("--steps", type=int, help="default: 2000, or 120 with --fast")
    parser.add_argument("--rows", type=int, help="training rows per task at most; default: all, or 300 with --fast")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/causal_lm"))
    options = parser.parse_args()
    started = time.monotonic()
    steps = options.steps or (120 if options.fast else 2000)
    max_rows = options.rows or (300 if options.fast else 1_000_000)
    test_rows, max_tokens = (24, 32) if options.fast else (400, 128)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = load_tokenizer()
    tasks = [load_task(name) for name in TASKS]
    train = {t.name: chats(t, "train", tokenizer, max_rows=max_rows, max_tokens=max_tokens) for t in tasks}
    test = {t.name: chats(t, "test", tokenizer, max_rows=test_rows, max_tokens=max_tokens) for t in tasks}
    test_all = concatenate_datasets(list(test.values()))
    test_tasks = [name for name, rows in test.items() for _ in range(len(rows))]
    base = load_base(torch.bfloat16).to(device)
    before = exact_matches(answers(base, tokenizer, test_all, None), test_all)
    print(f"base model: {sum(before) / len(before):.3f} exact matches", flush=True)

    config = HyperAdapterConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", tasks={task.name: task.description for task in tasks}
    )
    trainer = MultiTaskSFTTrainer(
        base,
        SFTConfig(
            output_dir=str(options.output),
            max_steps=steps,
            per_device_train_batch_size=8 if options.fast else 32,
            learning_rate=options.learning_rate,
            warmup_steps=steps // 16,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to="none",
            max_length=None,
            use_cpu=device == "cpu",
            bf16=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=device == "cuda",
            seed=0,
        ),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=config,
        temperature=2.0,
    )
    trainer.train()
    model = trainer.model.eval()
    after = exact_matches(answers(model, tokenizer, test_all, test_tasks), test_all)
    folder = options.output / "hyperadapter"
    model.save_pretrained(folder)

    print(f"\n{'task':<16}{'classes':>8}{'majority':>10}{'base model':>12}{'hyperadapter':>14}")
    scores = []
    for task in tasks:
        mine = [index for index, name in enumerate(test_tasks) if name == task.name]
        [(answer, _)] = Counter(completion[0]["content"] for completion in train[task.name]["completion"]).most_common(
            1
        )
        majority = exact_matches([answer] * len(mine), test[task.name])
        row = [sum(matches) / len(mine) for matches in (majority, [before[i] for i in mine], [after[i] for i in mine])]
        scores.append(row)
        print(f"{task.name:<16}{len(task.labels):>8}{row[0]:>10.3f}{row[1]:>12.3f}{row[2]:>14.3f}")
    trainable, total = model.get_nb_trainable_parameters()
    seconds = time.monotonic() - started
    save_card(
        model,
        folder,
        module="examples.train_causal_lm" + " --fast" * options.fast,
        title="Nine text tasks as chats in one hyperadapter",
        usage=USAGE.format(folder=folder.as_posix()),
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        results={
            task.name: {"exact match": row[2], "exact match of the base model": row[1]}
            for task, row in zip(tasks, scores, strict=True)
        },
        training={
            "steps": steps,
            "batch_size": 8 if options.fast else 32,
            "learning_rate": options.learning_rate,
            "rows per task at most": max_rows,
            "tokens per text": max_tokens,
            "seed": 0,
            "trainable parameters": trainable,
        },
        log_history=trainer.state.log_history,
    )
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    print(f"{'mean':<16}{'':>8}{means[0]:>10.3f}{means[1]:>12.3f}{means[2]:>14.3f}")
    print(f"\ntrainable parameters: {trainable:,} of {total:,}; {steps} steps; {seconds:.0f} seconds on {device}")


if __name__ == "__main__":
    main()
