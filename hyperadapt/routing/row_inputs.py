"""The inputs of a model for some of its rows, images included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

# Images, videos and recordings, of which a row of text may have any number.
OF_ITEMS = ("pixel_", "image_", "video_", "mm_", "input_features", "feature_attention_mask", "input_audio")
# Others, such as image_sizes, belong to models in which images of one size may have different numbers of tokens.
EVEN_ITEMS = {"pixel_values", "pixel_attention_mask", "image_grid_thw", "mm_token_type_ids"}
_BY_ROW = {"pixel_attention_mask", "mm_token_type_ids"}


def rows_of_input(value: Any, rows: Sequence[int], num_rows: int, name: str = "") -> Any:
    """An input, or several, for some of the rows; nothing that the model could change is shared with them."""
    if isinstance(value, Tensor):
        if name.startswith("decoder_") and value.ndim and not value.shape[0] % num_rows:
            # As many for a row as a decoder has codebooks.
            return value.reshape(num_rows, -1, *value.shape[1:])[list(rows)].flatten(0, 1)
        return value[list(rows)] if value.ndim and value.shape[0] == num_rows else value.clone()
    if isinstance(value, Mapping):
        # Outputs of an encoder keep their class.
        return type(value)(**{key: rows_of_input(inner, rows, num_rows, key) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        # A list of anything but tensors has one for each row, and so has one of images.
        is_by_row = isinstance(value, list) and len(value) == num_rows
        is_by_row = is_by_row and (name.startswith(OF_ITEMS) or not isinstance(value[0], Tensor))
        return type(value)(
            [value[row] for row in rows] if is_by_row else [rows_of_input(one, rows, num_rows) for one in value]
        )
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise TypeError(f"{name or 'an input'} is a {type(value).__name__}, which may keep a state")


def items_of(items: Inputs, counts: Sequence[int], rows: Sequence[int]) -> Inputs | None:
    """The images of some rows, which have them in the order of the rows; None if none can tell which they are."""
    chosen = {}
    ends = list(accumulate(counts, initial=0))
    for name, value in items.items():
        if value.ndim > 4 or name in _BY_ROW:
            chosen[name] = value[list(rows)]
            continue
        sizes = value.prod(dim=1).tolist() if name == "image_grid_thw" else [1] * len(value)
        places = list(accumulate(sizes, initial=0))
        bounds = [(end * places[-1] / ends[-1]) for end in ends]
        if not set(bounds) <= set(places):
            return None
        kept = [range(places.index(bounds[row]), places.index(bounds[row + 1])) for row in rows]
        chosen[name] = value[[element for elements in kept for element in elements]]
    return chosen
