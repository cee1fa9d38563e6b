"""The hyperadapter inside of a model, and what is active in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.routing.requests import Request, Tasks
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.model import HyperAdapterModel


@contextmanager
def use_tasks(
    model: nn.Module,
    tasks: Tasks | None = None,
    *,
    task_embeddings: Tensor | None = None,
    task_rows: Mapping[str, Sequence[int] | Tensor] | None = None,
) -> Iterator[None]:
    """Set the tasks of the calls inside, for code that owns the call and cannot pass ``tasks=``.

    Args:
        model: A model with a hyperadapter, wrapped or not.
        tasks: One name for all rows, one name per row, or integer ids ``(batch,)``.
        task_embeddings: Shape ``(batch, task_embedding_dim)``, or ``(task_embedding_dim,)`` for all rows: for
            conditions that have no id.
        task_rows: Name of a part of the model -> for each element of what its modules get, the row it belongs to.
            For parts whose rows cannot be known, such as a vision tower that gets several images per row.

    Yields:
        None.

    Raises:
        ValueError: If nothing or both are given, or a task is unknown.
    """
    request = Request(tasks, task_embeddings, task_rows)
    if request.is_empty:
        raise ValueError("use_tasks got tasks=None and no task_embeddings; pass one of the two.")
    tuner = find_tuner(model)
    if tasks is not None:
        for name in tuner.active_adapters:
            resolve_task_ids(tasks, tuner.router.network(name).config.task_names)
    with tuner.router.asking(request):
        yield


def find_tuner(model: nn.Module) -> HyperAdapterModel:
    """The hyperadapter tuner inside a model, which may be wrapped (``PeftModel``, DDP, ``torch.compile``)."""
    for module in model.modules():
        if isinstance(module, HyperAdapterModel):
            return module
    raise TypeError(
        f"{type(model).__name__} has no hyperadapter. Make one with get_peft_model(model, HyperAdapterConfig(...)) or "
        "load one with PeftModel.from_pretrained."
    )


def active_network(model: nn.Module) -> tuple[str, HyperAdapterNetwork]:
    """Name and network of the one active adapter of a model; a network without a model is its own."""
    if isinstance(model, HyperAdapterNetwork):
        return "default", model
    tuner = find_tuner(model)
    return tuner.router.only(tuner.active_adapters)


def first_network(model: nn.Module) -> HyperAdapterNetwork:
    """As ``active_network``, of the first active adapter where several are, for what a card says of a model."""
    if isinstance(model, HyperAdapterNetwork):
        return model
    tuner = find_tuner(model)
    return tuner.router.network(tuner.active_adapters[0])
