"""Three text tasks with labels of their own, from training to names: `python -m examples.classify_texts`.

One classifier has an output for each label of all tasks. The adapter keeps which are whose, so that `pipeline` answers
with a task's own labels, also after loading, where the base model's classifier gets its size from the adapter.
"""

import time

from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForSequenceClassification, logging, pipeline

from examples.support.data import TextData
from examples.support.text_tasks import encoder_path
from examples.support.training import training_arguments, training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import HyperAdapterTrainer

# Of each task a text of our own.
TEXTS = {
    "trec6": "How many moons has Saturn?",
    "sms_spam": "Congratulations, you won a cruise! Text WIN to 80086 to claim it.",
    "movie_sent": "Two hours that I want back.",
}


def main() -> None:
    """Train, save, load, and answer."""
    options = training_parser(__doc__, steps=300, rows=4000, output="runs/classify_texts").parse_args()
    logging.set_verbosity_error()
    data = TextData(list(TEXTS), max_length=40, train=options.rows, test=max(20, options.rows // 10))
    starts = zip(data.tasks, data.offsets, strict=False)
    config = HyperAdapterConfig(
        task_type="SEQ_CLS",
        target_modules="all-linear",
        # Sentence encoders average over tokens: this layer, which the classifier reads, was never trained.
        modules_to_save=["pooler"],
        tasks=data.descriptions,
        task_labels={task.name: dict(enumerate(task.labels, start)) for task, start in starts},
    )
    base = AutoModelForSequenceClassification.from_pretrained(encoder_path(), num_labels=data.num_labels)
    arguments = training_arguments(options, evaluations=5, eval_strategy="no", save_strategy="no")
    trainer = HyperAdapterTrainer(
        get_peft_model(base, config), arguments, data.collator, data["train"], temperature=2.0
    )
    trainer.train()
    folder = options.output / "hyperadapter"
    trainer.model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)

    model = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    classifier = pipeline("text-classification", model=model, tokenizer=data.tokenizer)
    majority = data.majority()
    print(f"\n{'task':<12}{'labels':>8}{'majority':>10}{'accuracy':>10}")
    for task in data.tasks:
        rows = task.test.select(range(min(data.rows["test"], len(task.test))))
        found = classifier(list(rows["text"]), tasks=task.name, batch_size=64, truncation=True, max_length=40)
        right = [one["label"] == task.labels[label] for one, label in zip(found, rows["label"], strict=True)]
        accuracy = sum(right) / len(right)
        print(f"{task.name:<12}{len(task.labels):>8}{majority[task.name]:>10.3f}{accuracy:>10.3f}")
    print()
    for name, text in TEXTS.items():
        [best] = classifier(text, tasks=name)
        print(f"{name:<12}{best['label']} ({best['score']:.2f}): {text}")
    print(f"seconds: {time.monotonic() - data.started:.0f}")


if __name__ == "__main__":
    main()
