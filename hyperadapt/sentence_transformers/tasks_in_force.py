"""Which tasks there are, and which one calls mean that name none."""

from __future__ import annotations

from torch import nn

from hyperadapt.tuner.active import active_network, find_tuner

# The tasks that sentence-transformers itself asks for, in encode_query and encode_document.
AUTOMATIC = ("query", "document")


def task_names_of(model: nn.Module) -> list[str]:
    """The tasks of the active adapter."""
    return active_network(model)[1].config.task_names


def pinned_task(model: nn.Module) -> str | None:
    """The task that all calls have that name none: pinned, merged, or the only one."""
    router, (name, network) = find_tuner(model).router, active_network(model)
    names = network.config.task_names
    return router.merged.get(name) or router.pinned_task(name) or (names[0] if len(names) == 1 else None)
