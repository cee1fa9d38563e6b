"""What a model was before an adapter was put into it, to go back to after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hyperadapt.tuner.layer import layers_in


class ModelState:
    """The modules of a model with all that they hold, and which parameters train; not the values of tensors."""

    def __init__(self, model: nn.Module) -> None:
        routers = {id(layer.router): layer.router for layer in layers_in(model)}.values()
        # A base model's layers use networks that are part of the tuner alone.
        roots = [model, *(router.networks for router in routers)]
        modules = dict.fromkeys(module for root in roots for module in root.modules())
        self._attributes = [
            (owner, {name: (value, _contents(value)) for name, value in vars(owner).items()})
            for owner in (*modules, *routers)
        ]
        self._requires_grad = [
            (parameter, parameter.requires_grad) for root in roots for parameter in root.parameters()
        ]

    def restore(self) -> None:
        """Put everything back into the same objects, which others refer to."""
        for owner, attributes in self._attributes:
            for value, contents in attributes.values():
                if contents is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(contents)
            vars(owner).clear()
            vars(owner).update({name: value for name, (value, _) in attributes.items()})
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[ModelState]:
    """Give a model back as it was if what is done to it fails; yields what it was."""
    before = ModelState(model)
    try:
        yield before
    except Exception:
        before.restore()
        raise


def _contents(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else None
