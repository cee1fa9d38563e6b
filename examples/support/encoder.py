"""The base model of the text examples: MiniLM with mean pooling and a linear classifier, and its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from examples.support.text_tasks import TextTask, encoder_path


class MeanPoolingClassifier(BertPreTrainedModel):
    """A BERT encoder whose mean token representation is classified, as sentence encoders pool.

    Args:
        config: The encoder's configuration, with ``num_labels``.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify a batch.

        Args:
            input_ids: Token ids, shape ``(batch, length)``.
            attention_mask: 1 for tokens, 0 for padding, same shape.
            token_type_ids: Segment ids, same shape.
            labels: Class ids, shape ``(batch,)``.

        Returns:
            Logits ``(batch, num_labels)``, and the cross entropy if labels are given.
        """
        pooled = self.embed(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(layer_norm(pooled, pooled.shape[-1:]))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Mean token representation of a batch.

        Args:
            input_ids: Token ids, shape ``(batch, length)``.
            attention_mask: 1 for tokens, 0 for padding, same shape.
            token_type_ids: Segment ids, same shape.

        Returns:
            Shape ``(batch, hidden_size)``.
        """
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def load_base(num_labels: int, seed: int) -> MeanPoolingClassifier:
    """MiniLM with a new classifier.

    Args:
        num_labels: Number of classes.
        seed: Seed of the classifier's initial weights.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    # Otherwise it reports the new classifier as missing weights.
    logging.set_verbosity_error()
    model: MeanPoolingClassifier = MeanPoolingClassifier.from_pretrained(encoder_path(), num_labels=num_labels)
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """MiniLM's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_path())
    return tokenizer


def label_offsets(tasks: Sequence[TextTask]) -> list[int]:
    """First class id of each task where all tasks share one classifier.

    Args:
        tasks: The tasks.

    Returns:
        One offset per task, and the total number of classes at the end.
    """
    offsets = [0]
    for task in tasks:
        offsets.append(offsets[-1] + len(task.labels))
    return offsets


def predict_own_class(logits: Tensor, labels: Tensor, offsets: Sequence[int]) -> Tensor:
    """Class ids predicted where each row competes only among its own task's classes.

    Args:
        logits: Shape ``(batch, classes)``.
        labels: The true class ids, which tell the tasks, shape ``(batch,)``.
        offsets: See ``label_offsets``.

    Returns:
        Shape ``(batch,)``.
    """
    task_of_class = torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())
    task_of_class = task_of_class.to(logits.device)
    return logits.masked_fill(task_of_class != task_of_class[labels][:, None], -torch.inf).argmax(-1)


def encode(
    tasks: Sequence[TextTask], split: str, tokenizer: PreTrainedTokenizerBase, *, max_rows: int, max_length: int
) -> list[Dataset]:
    """Tokenise one split of every task.

    Args:
        tasks: The tasks.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tokenizer: The tokenizer.
        max_rows: Rows to keep per task, from the start of its fixed order.
        max_length: Tokens to keep per row.

    Returns:
        A data set per task, by increasing length, with the tokenizer's columns, ``labels`` (class ids of the
        shared classifier) and ``tasks`` (task ids).
    """
    encoded = []
    for task_id, (task, offset) in enumerate(zip(tasks, label_offsets(tasks)[:-1], strict=True)):
        rows: Dataset = getattr(task, split)
        rows = rows.select(range(min(max_rows, len(rows))))
        texts, pairs = list(rows["text"]), list(rows["text_pair"])
        columns = dict(tokenizer(texts, None if pairs[0] is None else pairs, truncation=True, max_length=max_length))
        columns["labels"] = [label + offset for label in rows["label"]]
        columns["tasks"] = [task_id] * len(rows)
        # Rows of similar length side by side save most of the padding in evaluation; training shuffles.
        order = sorted(range(len(rows)), key=lambda row: len(columns["input_ids"][row]))
        encoded.append(Dataset.from_dict(columns).select(order))
    return encoded


def batches(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Tensor]]:
    """Padded batches of 64 rows, in order.

    Args:
        rows: An encoded data set.
        tokenizer: The tokenizer.

    Yields:
        A batch of the data set's columns.
    """
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), 64):
        yield collate([rows[index] for index in range(start, min(start + 64, len(rows)))])


@torch.no_grad()
def predict_logits(model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits of a data set.

    Args:
        model: A model that takes the batch's columns.
        rows: An encoded data set.
        tokenizer: The tokenizer.

    Returns:
        Shape ``(rows, num_labels)``.
    """
    return torch.cat([model(**batch).logits for batch in batches(rows, tokenizer)])
