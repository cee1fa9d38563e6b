"""A classifier without a head of its own: MiniLM, whose text vectors are matched with vectors of the class names.

It scores the classes of any task, so that tasks which were never trained can be tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase, logging
from transformers.modeling_outputs import SequenceClassifierOutput

from examples.support.encoder import label_offsets
from examples.support.text_tasks import TextTask, encoder_path

# Inverse temperature of the cosines, as sentence encoders are trained with.
SCALE = 20.0


class LabelMatcher(BertPreTrainedModel):
    """A BERT encoder with mean pooling that scores classes by cosine with fixed vectors of their names.

    A row competes among the classes of its own task alone.

    Args:
        config: The encoder's configuration, with ``num_labels``: the classes of all tasks.
    """

    label_vectors: Tensor
    task_of_label: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.register_buffer("label_vectors", torch.zeros(config.num_labels, config.hidden_size), persistent=False)
        self.register_buffer("task_of_label", torch.zeros(config.num_labels, dtype=torch.long), persistent=False)
        self.post_init()

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Mean token representation of a batch, of length 1.

        Args:
            input_ids: Token ids, shape ``(batch, length)``.
            attention_mask: 1 for tokens, 0 for padding, same shape.
            token_type_ids: Segment ids, same shape.

        Returns:
            Shape ``(batch, hidden_size)``, float32.
        """
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state.float()
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * weights).sum(1), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Score the classes.

        Args:
            input_ids: Token ids, shape ``(batch, length)``.
            attention_mask: 1 for tokens, 0 for padding, same shape.
            token_type_ids: Segment ids, same shape.
            labels: Class ids among those of all tasks, which also tell the rows' tasks, shape ``(batch,)``.

        Returns:
            Logits ``(batch, num_labels)``, -inf for classes of other tasks if labels are given, and then the cross
            entropy.
        """
        logits = SCALE * self.embed(input_ids, attention_mask, token_type_ids) @ self.label_vectors.T
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        others = self.task_of_label != self.task_of_label[labels][:, None]
        logits = logits.masked_fill(others, -torch.inf)
        return SequenceClassifierOutput(loss=cross_entropy(logits, labels), logits=logits)


@torch.no_grad()
def load_matcher(
    tasks: Sequence[TextTask], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> LabelMatcher:
    """MiniLM that matches texts with the class names of some tasks.

    Args:
        tasks: The tasks; class ids count through them (see ``label_offsets``).
        tokenizer: MiniLM's tokenizer.
        dtype: Of the encoder's weights. The class names' vectors are float32, and computed in float32.

    Returns:
        The model, in evaluation mode.
    """
    logging.set_verbosity_error()
    offsets = label_offsets(tasks)
    model: LabelMatcher = LabelMatcher.from_pretrained(encoder_path(), num_labels=offsets[-1]).eval()
    names = [name for task in tasks for name in task.labels]
    vectors = model.embed(**tokenizer(names, padding=True, return_tensors="pt"))
    model.to(dtype)
    model.label_vectors = vectors
    model.task_of_label = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(offsets).diff())
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[dict[str, Tensor]], **routing: object) -> float:
    """Share of rows whose own class scores highest among their task's classes.

    Args:
        model: A ``LabelMatcher``, adapted or not, in evaluation mode.
        batches: Batches with ``labels``.
        **routing: Passed to the model, such as ``tasks="bbc"``.

    Returns:
        The accuracy.
    """
    hits = [(model(**batch, **routing).logits.argmax(-1) == batch["labels"]).float() for batch in batches]
    return float(torch.cat(hits).mean())
