"""Running a model for a look at it, of which nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.randomness import randomness_kept


def has_no_values(*values: Any) -> bool:
    """Whether tensors only have sizes: on the device "meta", and while a program is exported."""
    return torch.compiler.is_compiling() or any(isinstance(value, Tensor) and value.is_meta for value in values)


@contextmanager
def undisturbed(module: nn.Module, at_rest: bool) -> Iterator[None]:
    """Run a module without gradients or compiled code, and without dropout; leave nothing of the run behind."""
    parts = list(module.modules())
    # bitsandbytes lays 4-bit weights out anew, for good, when they are called for inference.
    training = [
        part for part in parts if at_rest and part.training and not type(part).__module__.startswith("bitsandbytes")
    ]
    # What else a model sets in itself, such as switches for what it has prepared, may stay.
    states_of = [(part, {**vars(part), **part._buffers}) for part in parts]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if not has_no_values(buffer)]
    devices = list({buffer.device for buffer in (*module.parameters(), *module.buffers()) if buffer.is_cuda})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(randomness_kept(devices))
            if not torch.compiler.is_compiling():
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for part in training:
                part.training = False
            yield
    finally:
        for part in training:
            part.training = True
        with torch.no_grad():
            for part, before in states_of:
                for name, value in {**vars(part), **part._buffers}.items():
                    if value is not before.get(name, value) and (_is_state(value) or _is_state(before[name])):
                        setattr(part, name, before[name])
            for buffer, copied in buffers:
                if not torch.equal(buffer, copied):
                    buffer.copy_(copied)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor | float) or (isinstance(value, int) and not isinstance(value, bool))
