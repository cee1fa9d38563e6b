"""A new task from what a caller gives of it: a description, examples or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperadapt.config.task_fields import check_description
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.hypernetwork.warmup import counting_paused
from hyperadapt.routing.router import Router
from hyperadapt.tasks.table import Description, Encoder, TaskRow, TaskTable
from hyperadapt.tuner.example_features import check_classes, raw_vectors

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hyperadapt.tasks.fitting import Examples

Collator = Callable[[list[Any]], Any]


def table_of(network: HyperAdapterNetwork) -> TaskTable:
    """The tasks of an adapter whose parameters are whole."""
    if whole_network(network) is not network:
        raise ValueError(
            "The adapter is sharded over processes, so its tasks cannot be changed. Save it, and change them in one "
            "process."
        )
    return network.table


@dataclass(frozen=True)
class ExampleReader:
    """Reads rows with the base model of a router's layers, for the tasks of a table."""

    model: nn.Module
    router: Router
    table: TaskTable
    data_collator: Collator | None

    def read(self, examples: Examples, place: str) -> Tensor:
        """Vectors of rows; `place` names them in errors."""
        # Takes longer to import than all of this package.
        from transformers import default_data_collator

        config = self.table.config
        collate = self.data_collator or default_data_collator
        raw = raw_vectors(self.model, self.router, config, rows_in(examples), collate, place)
        check_classes(raw, config, place)
        return raw

    def embed(self, examples: Examples, description: Description | None, text_encoder: Encoder, place: str) -> Tensor:
        """The task embedding ``(task_embedding_dim,)`` of new examples, as many as the adapter reads at most."""
        rows = rows_in(examples)
        self.table.check_reads_examples(len(rows), place)
        return self.table.embed_examples(self.read(rows, place), description, text_encoder)

    # Tensors of inference mode could not be loaded into.
    @torch.inference_mode(False)
    def give(self, examples: Mapping[str, Examples]) -> None:
        """Take the examples of tasks into the table's embedding."""
        if not isinstance(examples, Mapping):
            raise TypeError(
                f"set_examples got a {type(examples).__name__}, but needs a dict, task name -> rows: pass "
                "{'name of the task': rows}."
            )
        self.table.check_example_tasks(list(examples))
        self.table.give_examples({name: self.read(rows, f"Task {name!r}") for name, rows in examples.items()})


def rows_in(examples: Examples) -> list[Any]:
    """The rows of examples, each a dict."""
    # Trainer and datasets take longer to import than all of this package.
    from hyperadapt.tasks.fitting import checked_rows

    return checked_rows(examples)


@dataclass(frozen=True)
class NewTask:
    """What a caller gives of a task, see ``HyperAdapterModel.add_task``."""

    name: str
    description: Description | None
    examples: Examples | None
    embedding: Tensor | None
    text_encoder: Encoder
    training_arguments: TrainingArguments | None
    fit: bool

    def check(self, table: TaskTable) -> None:
        """Refuse a name that cannot be given, and too little or too much to go by."""
        table.check_new_name(self.name)
        if self.description is None and self.examples is None and self.embedding is None:
            raise ValueError(
                f"add_task({self.name!r}) got nothing to go by. Pass description=, examples= or embedding=."
            )
        if self.examples is not None and self.embedding is not None:
            raise ValueError(f"add_task({self.name!r}) got both examples and an embedding. Pass one of the two.")
        if self.description is not None:
            check_description(self.name, self.description)

    def row(self, reader: ExampleReader, module: nn.Module, call: Callable[..., Any]) -> TaskRow:
        """The task's row; `module` is what a fit freezes, and `call` runs it with an embedding on a batch."""
        table, description = reader.table, self.description
        kept = description if description is None or isinstance(description, str) else list(description)
        if self.embedding is not None:
            return TaskRow(self.name, "learned", kept, table.checked_embedding(self.embedding))
        if self.examples is not None:
            return TaskRow(self.name, "learned", kept, self._from_examples(reader, module, call))
        assert description is not None
        return TaskRow(self.name, "text", kept, text_vectors=table.vectors_of(description, self.text_encoder))

    def _from_examples(self, reader: ExampleReader, module: nn.Module, call: Callable[..., Any]) -> Tensor:
        assert self.examples is not None
        table, place = reader.table, f"Task {self.name!r}, examples"
        if not table.embedding.has_examples:
            starts = table.starts(self.description, self.text_encoder)
        elif self.fit or self.training_arguments is not None:
            raw = reader.read(self.examples, place)
            starts = table.embed_examples(raw, self.description, self.text_encoder)[None]
        else:
            return reader.embed(self.examples, self.description, self.text_encoder, place)
        from hyperadapt.tasks.fitting import fit_task_embedding

        with counting_paused(module):
            return fit_task_embedding(
                module,
                call,
                starts,
                self.examples,
                data_collator=reader.data_collator,
                training_arguments=self.training_arguments,
            )
