"""Teach a language model three ways to answer by rewards alone: `python -m examples.grpo_tasks`.

All tasks have the same questions; they differ in what GRPO rewards. Compared are rewards on other questions, before
and after: of all seeds that ran, `--seed 1` and so on. With --fast it runs two small steps, which teach little.
"""

import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig

from examples.support.causal_lm import load_base, load_tokenizer
from examples.support.seeds import print_over_seeds
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
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and generation")
    parser.add_argument("--fast", action="store_const", const={"steps": 2, "batch_size": 6, "test_rows": 1}, default={})
    options = parser.parse_args()
    vars(options).update(options.fast)
    set_seed(options.seed)
    texts = load_task("trec6").train["text"][: options.rows + options.test_rows]
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})
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
            **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "seed": options.seed},
        ),
        train_dataset=dict.fromkeys(REWARDS, rows.skip(options.test_rows)),
        eval_dataset=dict.fromkeys(REWARDS, rows.take(options.test_rows)),
        processing_class=load_tokenizer(),
        peft_config=HyperAdapterConfig(task_type="CAUSAL_LM", target_modules="all-linear", tasks=list(REWARDS)),
    )
    before = trainer.evaluate()
    seconds = trainer.train().metrics["train_runtime"]
    print(f"\n{options.steps} steps in {seconds:.0f} seconds")
    columns = {"reward before": before, "after": trainer.evaluate()}
    print_over_seeds(
        options, {task: {key: value[f"eval_{task}_reward"] for key, value in columns.items()} for task in REWARDS}
    )


if __name__ == "__main__":
    main()
