"""Teach MiniLM four uses of its vectors in one run: `python -m examples.embedding_tasks`.

Questions are to find passages that answer them, and the same question in another spelling; other vectors are to tell
kinds of questions, and topics of posts. With --fast it runs a few small steps, which teach little.
"""

from collections.abc import Sequence

from numpy import ndarray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

from examples.support.embedding_texts import COLUMNS, DATA, USES, Amount, scores, training_data
from examples.support.text_tasks import encoder_path
from examples.support.training import training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.sentence_transformers import (
    MultiTaskSentenceTransformerTrainer,
    add_hyperadapter,
    export_sentence_transformer,
)


def main() -> None:
    """Measure, train, measure again, save and export."""
    parser = training_parser(__doc__, steps=200, rows=800, output="runs/embedding_tasks")
    parser.set_defaults(batch_size=16)
    parser.add_argument("--fast", action="store_const", const={"steps": 4, "batch_size": 4, "rows": 8}, default={})
    options = parser.parse_args()
    vars(options).update(options.fast)
    sizes = (12, 12, 12) if options.fast else (300, 150, 300)

    model = SentenceTransformer(str(encoder_path()), device="cpu")
    model.max_seq_length = 20
    config = HyperAdapterConfig(
        tasks=USES, target_modules=["query", "key", "value", "dense"], layers_to_transform=[4, 5]
    )
    add_hyperadapter(model, config)

    def encode(texts: Sequence[str], task: str) -> ndarray:
        return model.encode(list(texts), tasks=task, show_progress_bar=False)

    amount = Amount(options.rows, *sizes)
    # Its start is MiniLM as it is.
    before = scores(encode, "test", amount)
    ranking, grouping = MultipleNegativesRankingLoss(model), CoSENTLoss(model)
    MultiTaskSentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(options.output / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            # A question and its passage have tasks of their own; the other data sets are called after theirs.
            router_mapping=COLUMNS,
            multi_dataset_batch_sampler="round_robin",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        training_data(amount, seed=0),
        loss={"retrieval": ranking, "duplicates": ranking, "kinds": grouping, "topics": grouping},
    ).train()
    after = scores(encode, "test", amount)

    folder = options.output / "model"
    model.save_pretrained(str(folder))
    export_sentence_transformer(model, "kinds", options.output / "kinds")
    loaded, plain = SentenceTransformer(str(folder)), SentenceTransformer(str(options.output / "kinds"))
    question = "Who wrote Dracula?"
    difference = abs(loaded.encode(question, tasks="kinds") - plain.encode(question)).max()
    print(f"\nloaded from {folder}; an exported task differs by {difference:.0e}")
    print("\n| data | MiniLM | after training |\n|---|---|---|")
    for name in DATA:
        print(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |")


if __name__ == "__main__":
    main()
