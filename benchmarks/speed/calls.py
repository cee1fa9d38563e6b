"""What the speed benchmark times: one call of an arm for each measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from benchmarks.speed.arms import LORA, MERGED, PINNED, Subject, is_encoder

Call = Callable[[], object]


def forward_call(subject: Subject, batch: dict[str, Tensor]) -> Call:
    """A forward pass without gradients.

    Args:
        subject: The arm.
        batch: The batch.

    Returns:
        What to time.
    """

    def call() -> object:
        with torch.no_grad(), _autocast(batch):
            return subject.model(**batch, **subject.routing)

    return call


def generation_call(subject: Subject, batch: dict[str, Tensor], new_tokens: int) -> Call:
    """Greedy generation.

    Args:
        subject: The arm.
        batch: The prompts.
        new_tokens: Number of tokens to generate.

    Returns:
        What to time.
    """
    model = subject.model
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def call() -> object:
        with torch.no_grad(), _autocast(batch):
            return model.generate(**batch, **subject.routing, **limits)

    return call


def loss_call(subject: Subject, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The forward pass of training.

    Args:
        subject: The arm; it is put into training mode.
        batch: The batch. An encoder has no labels; its loss is the mean square of its output.

    Returns:
        What returns the loss, with its graph.
    """
    model = subject.model.train()
    encodes = is_encoder(model.config)

    def call() -> Tensor:
        with _autocast(batch):
            if encodes:
                output: Tensor = model(**batch, **subject.routing)[0]
                return output.square().mean()
            loss: Tensor = model(**batch, labels=batch["input_ids"], **subject.routing).loss
            return loss

    return call


def training_call(subject: Subject, batch: dict[str, Tensor]) -> Call:
    """A training step: forward, backward, and AdamW as Trainer makes it by default (fused).

    Args:
        subject: The arm; it is put into training mode.
        batch: The batch.

    Returns:
        What to time.
    """
    loss = loss_call(subject, batch)
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    # A CUDA graph can hold it, at no cost.
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=batch["input_ids"].is_cuda)

    def call() -> None:
        torch.autograd.backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    return call


def as_step(call: Call) -> Call:
    """A call that tells the compiler's CUDA graphs that results of the one before are no longer needed.

    Args:
        call: What to time.

    Returns:
        What to time.
    """

    def step() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return step


def cold_start_call(arm: str, subject: Subject, batch: dict[str, Tensor], names: Sequence[str], folder: Path) -> Call:
    """From a task that the model does not have at hand to the first row's output.

    LoRA is read from its file into the adapter in use (PEFT's hotswap, its cheapest way); a pinned hyperadapter
    generates the task's factors, a merged one also puts the base weights back and merges anew; the base model has no
    tasks.

    Args:
        arm: Name of the arm.
        subject: The arm.
        batch: The batch, of which the first row is used.
        names: Names of the tasks, which take turns.
        folder: An existing folder for LoRA's file.

    Returns:
        What to time.
    """
    model = subject.model
    forward = forward_call(subject, {name: tensor[:1] for name, tensor in batch.items()})
    turn = 0
    if arm == LORA:
        model.save_pretrained(folder)
        # PEFT saves an adapter into a folder of its name.
        folder = folder / names[0]

    def call() -> object:
        nonlocal turn
        turn += 1
        if arm == LORA:
            hotswap_adapter(model, str(folder), names[0], torch_device=str(batch["input_ids"].device))
        elif arm == PINNED:
            model.set_task(names[turn % len(names)])
        elif arm == MERGED:
            model.unmerge_adapter()
            model.set_task(names[turn % len(names)])
            model.merge_adapter()
        return forward()

    return call


def _autocast(batch: dict[str, Tensor]) -> torch.autocast:
    """On a GPU adapters in float32 compute in the base model's bfloat16, in every arm."""
    is_gpu = batch["input_ids"].is_cuda
    return torch.autocast("cuda" if is_gpu else "cpu", dtype=torch.bfloat16, enabled=is_gpu)
