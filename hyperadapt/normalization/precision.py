"""Small matrices in their own precision, whatever autocast asks of the model around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def own_dtype(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast: in the dtype of the tensors, since this is a small share of the work."""
    # The device "meta" knows no autocast.
    is_known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_known else nullcontext()
