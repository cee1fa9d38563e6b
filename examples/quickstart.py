"""One hypernetwork, seven real text tasks: `python -m examples.quickstart`.

Transformers' Trainer trains on batches that mix the tasks. What was saved is loaded again in a fresh process, one task
is exported as an ordinary LoRA, and every task is compared with a linear probe on the frozen encoder.
"""

from peft import get_peft_model
from transformers import Trainer

from examples.support.cards import save_classifier_card
from examples.support.data import TextData
from examples.support.encoder import load_base
from examples.support.fresh_process import check_exported, check_reloaded
from examples.support.probes import print_comparison, probe_accuracies
from examples.support.training import training_arguments, training_parser
from hyperadapt import HyperAdapterConfig, export_lora

TASKS = ("trec6", "sms_spam", "movie_sent", "product_sent", "stereoset_rel", "trump_clinton", "bbc")


def main() -> None:
    """Train, save, reload, export, and print the comparison."""
    parser = training_parser(__doc__, steps=400, rows=2000, output="runs/quickstart")
    parser.add_argument("--normalization", default="soft_polar")
    options = parser.parse_args()
    data = TextData(TASKS, max_length=40, train=options.rows, validation=options.rows // 25, test=options.rows // 5)
    config = HyperAdapterConfig(
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        tasks=data.descriptions,
        normalization=options.normalization,
    )
    model = get_peft_model(load_base(data.num_labels, seed=0), config)
    trainer = Trainer(
        model,
        training_arguments(options, evaluations=4, save_strategy="no", remove_unused_columns=False),
        data.collator,
        data.mixed("train"),
        data.mixed("validation"),
        compute_metrics=data.accuracies,
        preprocess_logits_for_metrics=data.own_class,
    )
    trainer.train()

    folder, lora = options.output / "hyperadapter", options.output / "lora-trec6"
    model.eval().save_pretrained(folder)
    export_lora(model, "trec6", lora)
    logits = data.predict(model)
    check_reloaded(folder, data, logits)
    check_exported(lora, "trec6", data, logits["trec6"])

    scores, probes = data.test_accuracies(logits), probe_accuracies(data)
    results = {name: {"accuracy": scores[name], "accuracy of a linear probe": probes[name]} for name in TASKS}
    save_classifier_card(model, folder, "quickstart", data, results, trainer)
    print_comparison(model, data, probes, scores)


if __name__ == "__main__":
    main()
