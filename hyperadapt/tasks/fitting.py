"""Fitting the embedding of a new task to labelled examples, with everything else frozen."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from hyperadapt.config.checks import shown
from hyperadapt.randomness import randomness_kept

Examples: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
Call: TypeAlias = Callable[[Tensor, Mapping[str, Any]], Any]
BATCH_SIZE = 32


def fit_task_embedding(
    model: nn.Module,
    call: Call,
    starts: Tensor,
    examples: Examples,
    *,
    data_collator: Callable[[list[Any]], Any] | None = None,
    training_arguments: TrainingArguments | None = None,
) -> Tensor:
    """A task embedding ``(task_embedding_dim,)``, fitted with ``Trainer`` from the best start; all else is frozen.

    Dropout is off: an embedding has few numbers, and is regular enough. ``call`` runs the model on a batch with an
    embedding for all rows. Rows are stacked where there is no collator; without arguments, a short run suits 8 to 64
    examples. A bar counts starting points and steps, unless transformers' bars are off.
    """
    rows = checked_rows(examples)
    device = starts.device
    collate = data_collator or default_data_collator
    with (
        # Both may be off around the call.
        torch.inference_mode(False),
        torch.enable_grad(),
        # Trainer seeds every device.
        randomness_kept(range(torch.cuda.device_count())),
        _frozen(model),
        tempfile.TemporaryDirectory() as folder,
        logging.tqdm(total=len(starts), desc="fitting the new task") as bar,
    ):
        fitted = _FittedTask(_best_start(call, starts, rows, collate, bar.update), call)
        arguments = _for_an_embedding(training_arguments or default_arguments(folder, len(rows), device), folder)
        # Trainer finds out from a signature which columns a model reads, and this one's names none.
        arguments.remove_unused_columns, arguments.label_names = False, ["labels"]
        trainer = Trainer(
            fitted,
            arguments,
            collate,
            train_dataset=rows,
            callbacks=[_Steps(bar, len(starts), fitted)],
        )
        # Trainer warns of models that say nothing about gradient accumulation.
        trainer.model_accepts_loss_kwargs = False
        # Without a progress bar it would print its own times.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    embedding = fitted.task_embedding.detach().to(device)
    if not embedding.isfinite().all():
        raise ValueError(
            "The new task's embedding is not finite after fitting it. Check the examples, or pass training_arguments "
            "with a smaller learning_rate."
        )
    return embedding


def default_arguments(folder: str, num_examples: int, device: torch.device) -> TrainingArguments:
    """A short run for few examples, in a folder that Trainer may write to."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=40,
        per_device_train_batch_size=min(num_examples, BATCH_SIZE),
        learning_rate=0.2,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _for_an_embedding(given: TrainingArguments, folder: str) -> TrainingArguments:
    """A copy of arguments that may be those of a whole training: it saves nothing, and touches no checkpoint."""
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):
        if getattr(given, name):
            raise ValueError(
                f"training_arguments has {name}={getattr(given, name)}, which needs a whole model, but only a task "
                "embedding is fitted. Leave it out."
            )
    arguments = copy.copy(given)
    arguments.output_dir, arguments.save_strategy, arguments.eval_strategy = (
        folder,
        SaveStrategy.NO,
        IntervalStrategy.NO,
    )
    arguments.load_best_model_at_end = arguments.push_to_hub = False
    # The model's own switch, which stays as it is; transformers is changing its name.
    arguments.gradient_checkpointing = arguments.activation_checkpointing = False
    return arguments


class _FittedTask(nn.Module):
    """A task embedding as the only parameter of a model.

    The model is no submodule: Trainer moves, wraps and switches what it sees.
    """

    def __init__(self, start: Tensor, call: Call) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(start.clone())
        self.call = call
        self.loss: Tensor | None = None

    def forward(self, **batch: Any) -> Any:
        output = self.call(self.task_embedding, batch)
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self.loss = loss.detach()
        return output


class _Steps(TrainerCallback):
    """Counts the steps on a bar that may have counted before, with the loss of each."""

    def __init__(self, bar: Any, before: int, fitted: _FittedTask) -> None:
        self.bar, self.before, self.fitted = bar, before, fitted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.total = self.before + state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fitted.loss is not None:
            self.bar.set_postfix_str(f"loss {float(self.fitted.loss):.4g}", refresh=False)
        self.bar.update()


def checked_rows(examples: Examples) -> list[Any]:
    """The rows of examples, each a dict."""
    if not isinstance(examples, Dataset | Sequence) or isinstance(examples, str):
        raise TypeError(
            f"examples is of type {type(examples).__name__}, but must be a datasets.Dataset or a list of rows, each a "
            "dict of model inputs with labels."
        )
    rows = list(examples)
    if not rows:
        raise ValueError("examples has no rows. Give some labelled examples, 8 to 64 are enough.")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"Row {index} of examples is {shown(row)}, but must be a dict of model inputs with labels.")
    return rows


@torch.no_grad()
def _best_start(
    call: Call, starts: Tensor, rows: list[Any], collate: Callable[[list[Any]], Any], progress: Callable[[], Any]
) -> Tensor:
    batches = [collate(rows[index : index + BATCH_SIZE]) for index in range(0, len(rows), BATCH_SIZE)]
    losses = []
    for start in starts:
        total = 0.0
        for index, batch in enumerate(batches):
            inputs = {
                name: value.to(starts.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            loss = getattr(call(start, inputs), "loss", None)
            if loss is None:
                raise ValueError(
                    f"The model gave no loss for columns {sorted(inputs)}. Every example needs the labels that the "
                    "model is trained with."
                )
            total += float(loss) * len(rows[index * BATCH_SIZE : (index + 1) * BATCH_SIZE])
        losses.append(total)
        progress()
    values = torch.tensor(losses)
    if not values.isfinite().any():
        raise ValueError(f"The loss of the examples is {losses[0]} from every starting point. Check their labels.")
    return starts[int(values.nan_to_num(torch.inf).argmin())]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients by parameters, and in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
