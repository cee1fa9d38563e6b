"""Fine-tune a causal language model on nine tasks written as chats: `python -m examples.train_causal_lm --fast`.

TRL's SFTTrainer does the training, extended by ``TaskTrainerMixin``. Compared are exact matches of generated answers:
always the most frequent class, the base model with the same prompts, and the hyperadapter. With --fast it takes some
minutes on a CPU; without, use a GPU.
"""

import time

import torch
from trl import SFTConfig, SFTTrainer

from examples.support.cards import save_chat_card
from examples.support.causal_lm import ChatData, load_base, print_comparison, share
from examples.support.training import training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskTrainerMixin

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent"),
    *("reuters_r8", "stereoset_rel", "trump_clinton", "bbc"),
)
FAST = {"steps": 120, "rows": 300, "batch_size": 8, "test_rows": 24, "max_tokens": 32}


class MultiTaskSFTTrainer(TaskTrainerMixin, SFTTrainer):
    """SFTTrainer that samples, logs and evaluates by task."""


def main() -> None:
    """Evaluate, train, evaluate again and print the table."""
    parser = training_parser(__doc__, steps=2000, rows=1_000_000, output="runs/causal_lm")
    parser.set_defaults(test_rows=400, max_tokens=128)
    parser.add_argument("--fast", action="store_true", help="few rows and steps, short texts")
    if parser.parse_known_args()[0].fast:
        parser.set_defaults(**FAST)
    options = parser.parse_args()
    started = time.monotonic()
    data = ChatData(TASKS, max_tokens=options.max_tokens, train=options.rows, test=options.test_rows)
    base = load_base(torch.bfloat16).to("cuda" if torch.cuda.is_available() else "cpu")
    before = data.matches(base)
    print(f"base model: {share(before):.3f} exact matches", flush=True)

    trainer = MultiTaskSFTTrainer(
        base,
        SFTConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 16,
            logging_steps=max(1, options.steps // 8),
            save_strategy="no",
            report_to="none",
            max_length=None,
            use_cpu=base.device.type == "cpu",
            bf16=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=base.device.type == "cuda",
            seed=0,
        ),
        train_dataset=data["train"],
        processing_class=data.tokenizer,
        peft_config=HyperAdapterConfig(task_type="CAUSAL_LM", target_modules="all-linear", tasks=data.descriptions),
        temperature=2.0,
    )
    trainer.train()
    model, folder = trainer.model.eval(), options.output / "hyperadapter"
    model.save_pretrained(folder)
    after = data.matches(model, with_tasks=True)
    save_chat_card(trainer, folder, print_comparison(data, before, after), options)
    trainable, total = model.get_nb_trainable_parameters()
    duration = f"{options.steps} steps; {time.monotonic() - started:.0f} seconds on {base.device.type}"
    print(f"\ntrainable parameters: {trainable:,} of {total:,}; {duration}")


if __name__ == "__main__":
    main()
