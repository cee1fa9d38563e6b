"""Teach a language model three ways to answer by rewards alone: `python -m examples.grpo_tasks`.

All tasks have the same questions; they differ in what GRPO rewards. Compared are rewards on other questions, before
and after. With --fast it runs two small steps, which teach little.
"""

import torch
from datasets import Dataset
from trl import GRPOConfig

from examples.support.causal_lm import load_base, load_tokenizer
from examples.support.text_tasks import load_task
from examples.support.training import training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.trl import MultiTaskGRPOTrainer

TOKENS = 24


def brief(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of the room for an answer that is left."""
    return [1 - len(ids) / TOKENS for ids in completion_ids]


def excited(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    """Exclamation marks, of three."""
    return [min(1.0, message["content"].count("!") / 3) for [message] in completions]


def loud(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    """Share of the characters that are capitals."""
    return [sum(map(str.isupper, one["content"])) / max(1, len(one["content"])) for [one] in completions]


REWARDS = {"brief": brief, "excited": excited, "loud": loud}


def main() -> None:
    """Measure, train and measure again."""
    parser = training_parser(__doc__, steps=50, rows=400, output="runs/grpo_tasks")
    parser.set_defaults(batch_size=24, learning_rate=5e-3, test_rows=12)
    parser.add_argument("--fast", action="store_const", const={"steps": 2, "batch_size": 6, "test_rows": 1}, default={})
    options = parser.parse_args()
    vars(options).update(options.fast)
    texts = load_task("trec6").train["text"][: options.rows + options.test_rows]
    questions = [[{"role": "user", "content": text}] for text in texts]
    rows = Dataset.from_dict({"prompt": questions})
    trainer = MultiTaskGRPOTrainer(
        load_base(torch.float32),
        REWARDS,
        GRPOConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            num_generations=options.batch_size // 3,
            max_completion_length=TOKENS,
            learning_rate=options.learning_rate,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dict.fromkeys(REWARDS, rows.skip(options.test_rows)),
        eval_dataset=dict.fromkeys(REWARDS, rows.take(options.test_rows)),
        processing_class=load_tokenizer(),
        peft_config=HyperAdapterConfig(task_type="CAUSAL_LM", target_modules="all-linear", tasks=list(REWARDS)),
    )
    before = trainer.evaluate()
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate()
    print(f"\n{options.steps} steps in {seconds:.0f} seconds\n\n| task | reward before | after |\n|---|---|---|")
    for name in REWARDS:
        print(f"| {name} | {before[f'eval_{name}_reward']:.2f} | {after[f'eval_{name}_reward']:.2f} |")


if __name__ == "__main__":
    main()
