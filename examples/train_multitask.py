"""Fine-tune MiniLM on ten text tasks at once with HyperAdapterTrainer: `python -m examples.train_multitask`.

The model that is best on the mean validation accuracy over tasks is kept, and tested task by task.
"""

import time
from pathlib import Path

from peft import get_peft_model
from transformers import EvalPrediction

from examples.support.cards import save_classifier_card
from examples.support.data import TextData
from examples.support.encoder import load_base
from examples.support.training import training_arguments, training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import HyperAdapterTrainer

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent"),
    *("reuters_r8", "stereoset_rel", "trump_clinton", "bbc", "newsgroups20"),
)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right predictions among a task's rows."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def main() -> None:
    """Train, choose, test and print the table."""
    parser = training_parser(__doc__, steps=500, rows=4000, output="runs/multitask")
    parser.add_argument("--temperature", type=float, default=2.0, help="1 samples tasks by size, 100 nearly alike")
    options = parser.parse_args()
    sizes = {"train": options.rows, "validation": max(20, options.rows // 40), "test": max(20, options.rows // 10)}
    data = TextData(TASKS, max_length=40, **sizes)
    config = HyperAdapterConfig(
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        tasks=data.descriptions,
    )
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mean_accuracy", "greater_is_better": True}
    trainer = HyperAdapterTrainer(
        get_peft_model(load_base(data.num_labels, seed=0), config),
        training_arguments(options, evaluations=5, save_total_limit=2, **best),
        data.collator,
        data["train"],
        data["validation"],
        temperature=options.temperature,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=data.own_class,
    )
    trainer.train()
    metrics = trainer.evaluate(data["test"], metric_key_prefix="test")

    model, folder = trainer.model.eval(), options.output / "hyperadapter"
    model.save_pretrained(folder)
    results = {name: {key: metrics[f"test_{name}_{key}"] for key in ("accuracy", "loss")} for name in TASKS}
    checkpoint = Path(trainer.state.best_model_checkpoint).name
    facts = {"best checkpoint": checkpoint, "temperature of sampling": options.temperature}
    save_classifier_card(model, folder, "train_multitask", data, results, trainer, **facts)

    majority = data.majority()
    print(f"\n{'task':<16}{'classes':>8}{'rows':>8}{'majority':>10}{'accuracy':>10}{'loss':>8}")
    for task in data.tasks:
        accuracy_and_loss = "{accuracy:>10.3f}{loss:>8.3f}".format(**results[task.name])
        counts = f"{len(task.labels):>8}{len(data['train'][task.name]):>8}"
        print(f"{task.name:<16}{counts}{majority[task.name]:>10.3f}{accuracy_and_loss}")
    print(f"\nbest checkpoint: {checkpoint} of {options.steps} steps")
    trainable, total = model.get_nb_trainable_parameters()
    print(f"trainable parameters: {trainable:,} of {total:,}; seconds: {time.monotonic() - data.started:.0f}")
    print(f"mean test accuracy: {metrics['test_mean_accuracy']:.3f} over {len(TASKS)} tasks")


if __name__ == "__main__":
    main()
