"""Learning how rows lie in what modules get, by running the model on single rows of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.routing.layouts import Call, Layout

# What each module got, call by call: see print_of.
Prints = Mapping[str, list[Tensor]]

_OF_ITEMS = ("pixel_", "image_", "video_", "mm_token_type_ids", "input_features", "feature_attention_mask")
# Others, such as image_sizes, belong to models in which images of one size may have different numbers of tokens.
_EVEN_ITEMS = {"pixel_values", "pixel_attention_mask", "image_grid_thw", "mm_token_type_ids"}
_BY_ROW = {"pixel_attention_mask", "mm_token_type_ids"}


def learned_layouts(
    module: nn.Module, call: Call, recording: Callable[[], AbstractContextManager[Prints]]
) -> dict[str, Layout | str]:
    """Run a module on single rows of a call and compare what its adapted layers get.

    While ``recording()`` they only leave prints of it, by position name.
    """
    call = replace(call, inputs=call.repeatable)
    runs = _Runs(module, call, recording)
    token = getattr(getattr(module, "config", None), "image_token_id", None)
    items = {name: value for name, value in call.inputs.items() if name.startswith(_OF_ITEMS) and value is not None}
    counts = call.count(token) if items and token is not None else None
    if counts is None or token is None:
        return runs.layouts(call.inputs)
    # A row has any number of images. What is called without them is called for rows, all else for images.
    ids = call.inputs["input_ids"]
    text = {name: value for name, value in call.inputs.items() if name not in items}
    text["input_ids"] = torch.where(ids == token, int(token == 0), ids)
    return runs.layouts_of_items(items, token, counts.tolist()) | runs.layouts(text)


def print_of(x: Tensor) -> Tensor:
    """At most 64 values of each element of the first dimension, shape ``(len(x), values)``."""
    size = x.shape[0] if x.ndim else 1
    flat = x.detach().reshape(size, -1) if x.numel() else x.new_zeros(size, 1)
    return flat[:, :: max(1, flat.shape[1] // 64)][:, :64].clone()


class _Runs:
    """Runs of a module on some rows of a call."""

    def __init__(self, module: nn.Module, call: Call, recording: Callable[[], AbstractContextManager[Prints]]) -> None:
        self.module, self.call, self.recording = module, call, recording

    def layouts(self, inputs: dict[str, Any]) -> dict[str, Layout | str]:
        """The layouts of all modules that are called."""
        one, two = self._unlike_rows()
        alone, other, both = (self._prints(self._rows(inputs, rows)) for rows in ([one], [two], [one, two]))
        layouts = {name: self._layout(alone[name], other.get(name, []), both.get(name, [])) for name in alone}
        for rows, others in self._of_other_values(inputs, one):
            for position, layout in layouts.items():
                found = [len(x) for x in others.get(position, [])]
                if not isinstance(layout, str) and found != [rows * len(x) for x in alone[position]]:
                    layouts[position] = "the number of its elements depends on what the rows say"
        for name in self._without_partner(inputs):
            try:
                fewer = self._prints(self._rows(inputs, [one, two]) | {name: inputs[name][[one]]})
            except Exception:
                # Each row needs its own.
                continue
            for position, prints in fewer.items():
                if [len(x) for x in prints] != [len(x) for x in both.get(position, [])]:
                    layouts[position] = f"{name} need not have as many as there are rows"
        return layouts

    def layouts_of_items(self, items: dict[str, Any], token: int, counts: list[int]) -> dict[str, Layout | str]:
        """The layouts of modules that are called for images, as far as each row's share of them is known."""
        if not items.keys() <= _EVEN_ITEMS or "pixel_values" not in items or not any(counts):
            return {}
        few, many = (choose((count, row) for row, count in enumerate(counts) if count)[1] for choose in (min, max))
        runs = []
        for rows in ([few], [many], [few, many]):
            chosen = _items_of(items, counts, rows)
            if chosen is None:
                return {}
            runs.append(self._prints(self._rows(self.call.inputs, rows) | chosen))
        alone, other, both = runs
        layouts: dict[str, Layout | str] = {}
        for name in alone.keys() & other.keys() & both.keys():
            is_even = len(alone[name]) == len(other[name]) == len(both[name]) and all(
                len(first) * counts[many] == len(second) * counts[few]
                and _is_close(torch.cat([first, second]), together)
                for first, second, together in zip(alone[name], other[name], both[name], strict=False)
            )
            layouts[name] = Layout(item_token=token) if is_even else "images do not keep their order there"
        return layouts

    def _layout(self, alone: list[Tensor], other: list[Tensor], both: list[Tensor]) -> Layout | str:
        """How rows lie in the calls of one module."""
        if not len(alone) == len(other) == len(both):
            return "it is called more often for some rows than for others"
        sizes: set[int] = set()
        lengths: set[str] = set()
        orders: set[bool] = set()
        for first, second, together in zip(alone, other, both, strict=True):
            size = len(first)
            if not size or len(second) != size or len(together) != 2 * size:
                return "its first dimension does not grow evenly with the rows"
            in_order = torch.cat([first, second])
            in_blocks = torch.stack([first, second], dim=1).flatten(0, 1)
            is_in_blocks = size > 1 and _distance(in_blocks, together) < _distance(in_order, together)
            if not _is_close(in_blocks if is_in_blocks else in_order, together):
                return "its elements depend on other rows, or are in another order"
            sizes.add(size)
            lengths.update(name for name in self.call.inputs if self.call.length(name) == size)
            orders.update([is_in_blocks] if size > 1 else [])
        if len(orders) > 1:
            return "its calls have rows in different orders"
        return Layout(frozenset(sizes), frozenset(lengths), orders == {True})

    def _unlike_rows(self) -> tuple[int, int]:
        """Two rows that differ in length where a mask tells it."""
        mask = self.call.inputs.get("attention_mask")
        if self.call.has_rows(mask) and mask.ndim == 2 and not mask.is_meta:
            lengths = mask.sum(dim=1).tolist()
            if min(lengths) < max(lengths):
                return lengths.index(min(lengths)), lengths.index(max(lengths))
        return 0, 1

    def _of_other_values(self, inputs: dict[str, Any], row: int) -> Iterator[tuple[int, Prints]]:
        """Runs of a row that is the same everywhere, of one with padding, and of all with values drawn anew.

        As far as the model takes them. What gets some of the tokens, as an expert does, gets all or none of the first,
        and other numbers of the last; what gets them without padding gets fewer of the second.
        """
        main, values = self.call.main, inputs.get(self.call.main)
        if not self.call.has_rows(values):
            return
        drawn = torch.randint(values.numel(), values.shape, generator=torch.Generator().manual_seed(0))
        alone = self._rows(inputs, [row])
        others = [
            (1, alone | {main: values[row].flatten()[0].expand_as(alone[main]).clone()}),
            (self.call.num_rows, inputs | {main: values.flatten()[drawn.to(values.device)]}),
        ]
        mask = alone.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            others.append((1, alone | {"attention_mask": torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], 1)}))
        for count, other in others:
            try:
                yield count, self._prints(other)
            except Exception:
                continue

    def _without_partner(self, inputs: Mapping[str, Any]) -> list[str]:
        """Inputs like images, of which the model may take more or fewer than rows."""
        return [
            name
            for name, value in inputs.items()
            if name != self.call.main and name.startswith(_OF_ITEMS) and self.call.has_rows(value) and value.ndim > 2
        ]

    def _rows(self, value: Any, rows: Sequence[int], name: str = "") -> Any:
        """An input, or several, for some of the rows."""
        if isinstance(value, Tensor):
            if name.startswith("decoder_") and value.ndim and not len(value) % self.call.num_rows:
                # As many for a row as a decoder has codebooks.
                return value.reshape(self.call.num_rows, -1, *value.shape[1:])[list(rows)].flatten(0, 1)
            return value[list(rows)] if self.call.has_rows(value) else value
        if isinstance(value, Mapping):
            # Outputs of an encoder keep their class.
            return type(value)(**{key: self._rows(inner, rows, key) for key, inner in value.items()})
        if isinstance(value, list | tuple):
            is_by_row = isinstance(value, list) and len(value) == self.call.num_rows
            kept = [value[row] for row in rows] if is_by_row else [self._rows(inner, rows) for inner in value]
            return type(value)(kept)
        return value

    def _prints(self, inputs: Mapping[str, Any]) -> Prints:
        by_place = [inputs[name] for name in sorted(inputs) if name.isdigit()]
        by_name = {name: value for name, value in inputs.items() if not name.isdigit()}
        with _at_rest(self.module), self.recording() as prints:
            self.module(*by_place, **by_name)
        return prints


def _items_of(items: Mapping[str, Any], counts: Sequence[int], rows: Sequence[int]) -> dict[str, Tensor] | None:
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


def _distance(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if x.is_meta:
        return 0.0
    return float((x.double() - y.double()).nan_to_num().abs().max())


def _is_close(x: Tensor, y: Tensor) -> bool:
    """Whether prints are the same but for rounding: a tenth of what elements differ by, or half of the digits."""
    if x.shape != y.shape or x.is_meta:
        return x.shape == y.shape
    rounding = torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0
    values = y.double().nan_to_num()
    spread, scale = (values.amax(dim=0) - values.amin(dim=0)).max(), values.abs().max()
    return _distance(x, y) <= float(0.1 * spread + rounding * scale)


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Run a module without gradients, dropout, compiled code or a trace in the random numbers."""
    # bitsandbytes lays 4-bit weights out anew, for good, when they are called for inference.
    own = [part for part in module.modules() if not type(part).__module__.startswith("bitsandbytes")]
    training = [part for part in own if part.training]
    tensors = (tensor for tensor in module.parameters() if tensor.is_cuda)
    devices = list({tensor.device for tensor in tensors})
    for part in training:
        part.training = False
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            # Those of the call itself follow.
            warnings.simplefilter("ignore")
            yield
    finally:
        for part in training:
            part.training = True
