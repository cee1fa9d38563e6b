"""Learning how rows lie in what modules get, by running the model on single rows of a batch."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.routing.layouts import Call, Layout, Layouts
from hyperadapt.routing.row_inputs import EVEN_ITEMS, OF_ITEMS, Inputs, items_of, rows_of_input
from hyperadapt.routing.undisturbed import has_no_values, undisturbed

# What each module got, call by call: see print_of.
Prints = Mapping[str, list[Tensor]]

# Have rows wherever they are given.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_BY_ROW = {*_TOKENS, "attention_mask", "token_type_ids", "labels", "encoder_outputs", "decoder_attention_mask"}

# A model is put to rest while it is learned, which no other thread should do at the same time.
_learning = threading.RLock()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def learn(
    layouts: Layouts,
    module: nn.Module,
    call: Call,
    recording: Callable[[], AbstractContextManager[Prints]],
    fused_experts: Collection[str] = (),
) -> Mapping[str, Layout | str]:
    """The layouts that hold in a call, learned if they are not known; within ``recording()`` layers leave prints.

    Fused experts, named here, get all tokens of all rows, unlike other experts.
    """
    with _learning:
        known = layouts.find(call)
        if known is not None:
            return known
        try:
            learned = _learned_layouts(module, call, recording, fused_experts)
        except Exception as error:
            # Not kept: another batch may do.
            call.problem = f"the model does not run on single rows ({error})"
            return {}
        if torch.compiler.is_compiling():
            # Of sizes alone, which are all that a program has while it is exported.
            return {name: _in_order(layout) for name, layout in learned.items()}
        layouts.keep(call, learned)
    if "torch._dynamo" in sys.modules:
        # A compiled model that is called for the first time has just been given up, and can be one graph from now on.
        frame = inspect.currentframe()
        while frame is not None:
            torch._dynamo.eval_frame.remove_from_cache(frame.f_code)
            frame = frame.f_back
    return learned


def _in_order(layout: Layout | str) -> Layout | str:
    if isinstance(layout, str) or layout.sizes == {1}:
        return layout
    return "their order cannot be seen while a program is exported; call the model once before"


def _learned_layouts(
    module: nn.Module,
    call: Call,
    recording: Callable[[], AbstractContextManager[Prints]],
    fused_experts: Collection[str],
) -> dict[str, Layout | str]:
    """Run a module on single rows of a call and compare what its adapted layers get.

    While ``recording()`` they only leave prints of it, by position name.
    """
    found = _learned(_Runs(module, call, recording))
    # As many as rows by chance, whatever was seen.
    experts = {name for name in found if "experts" in name.split(".")} - set(fused_experts)
    return found | dict.fromkeys(experts, "an expert gets the tokens that chose it")


def _learned(runs: _Runs) -> dict[str, Layout | str]:
    call, signature = runs.call, inspect.signature(runs.module.forward).parameters
    needed = {name: value for name, value in call.inputs.items() if name in signature and _is_needed(signature[name])}
    inputs = needed | call.repeatable
    items = {name: value for name, value in inputs.items() if name.startswith(OF_ITEMS)}
    if not items or call.main in items:
        return runs.layouts(inputs)
    # What is called without any images is called for rows, all else for images.
    try:
        of_text = runs.layouts(runs.without_items(inputs, items))
    except Exception:
        return runs.layouts_with_items(inputs)
    return runs.layouts_of_items(inputs, items) | of_text


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def print_of(x: Tensor) -> Tensor:
    """At most 64 values of each element of the first dimension, shape ``(len(x), values)``."""
    size = x.shape[0] if x.ndim else 1
    if not x.numel() or has_no_values(x):
        return x.new_zeros(size, 1)
    flat = x.detach().reshape(size, -1)
    return flat[:, :: max(1, flat.shape[1] // 64)][:, :64].clone()


class _Runs:
    """Runs of a module on some rows of a call."""

    def __init__(self, module: nn.Module, call: Call, recording: Callable[[], AbstractContextManager[Prints]]) -> None:
        self.module, self.call, self.recording = module, call, recording
        names = ("image_token_id", "video_token_id", "audio_token_id")
        tokens = (getattr(getattr(module, "config", None), name, None) for name in names)
        self.item_tokens = [token for token in tokens if isinstance(token, int)]

    def layouts(self, inputs: Inputs) -> dict[str, Layout | str]:
        """The layouts of all modules that are called."""
        pair = rows_of_input(inputs, self._unlike_rows(inputs), self.call.num_rows)
        for shown in self._variants(pair):
            try:
                runs = [self.prints(rows_of_input(shown, rows, 2)) for rows in ([0], [1], [0, 1], [1, 0])]
                break
            except Exception as error:
                failure = error
        else:
            raise failure
        alone, others = runs[0], runs[1:]
        layouts = {name: _layout(alone[name], *(run.get(name, []) for run in others)) for name in alone}
        if has_no_values(*pair.values()):
            return layouts
        if self.module.training:
            self._refuse_other_orders(layouts, runs, shown)
        self._refuse_parts(layouts, alone, pair, shown)
        self._refuse_partners(layouts, others[1], shown)
        return self._with_laws(layouts, alone, rows_of_input(shown, [0], 2))

    def layouts_with_items(self, inputs: Inputs) -> dict[str, Layout | str]:
        """The layouts of a model that has to have an image for each row."""
        layouts = self.layouts(inputs)
        if self.item_tokens:
            # Where the text says how many images there are, each row having one proves nothing.
            alone = rows_of_input(inputs, [0], self.call.num_rows)
            first, second = self.prints(alone), self.prints(alone | self._drawn(alone, seed=1, names=("input_ids",)))
            for name, prints in first.items():
                if all(torch.equal(*pair) for pair in zip(prints, second.get(name, []), strict=False)):
                    layouts[name] = "it gets images, of which a row may have any number"
        return layouts

    def layouts_of_items(self, inputs: Inputs, items: Inputs) -> dict[str, Layout | str]:
        """The layouts of modules that are called for images, as far as each row's share of them is known."""
        token = getattr(getattr(self.module, "config", None), "image_token_id", None)
        counted = None if token is None else self.call.count(token)
        if not items.keys() <= EVEN_ITEMS or "pixel_values" not in items or counted is None or not counted.any():
            return {}
        counts = counted.tolist()
        few, many = (choose((count, row) for row, count in enumerate(counts) if count)[1] for choose in (min, max))
        runs = []
        for rows in ([few], [many], [few, many]):
            chosen = items_of(items, counts, rows)
            if chosen is None:
                return {}
            runs.append(self.prints(rows_of_input(inputs, rows, self.call.num_rows) | chosen))
        layouts: dict[str, Layout | str] = {}
        for name in runs[0].keys() & runs[1].keys() & runs[2].keys():
            calls = list(zip(*(run[name] for run in runs), strict=False))
            is_even = all(
                len(first) * counts[many] == len(second) * counts[few] and _is_close(torch.cat([first, second]), both)
                for first, second, both in calls
            )
            layouts[name] = Layout(item_token=token) if is_even else "images do not keep their order there"
        return layouts

    def without_items(self, inputs: Inputs, items: Inputs) -> Inputs:
        """The text of the rows alone, without the tokens that stand for images."""
        text = {name: value for name, value in inputs.items() if name not in items}
        ids = text.get("input_ids")
        if ids is not None:
            text["input_ids"] = ids.masked_fill(self._stands_for_item(ids), self._plain_token())
        return text

    def prints(self, inputs: Inputs, at_rest: bool = True) -> Prints:
        """What adapted layers get in one run, without dropout unless it is not to be at rest."""
        by_place = [inputs[name] for name in sorted(inputs) if name.isdigit()]
        by_name = {name: value for name, value in inputs.items() if not name.isdigit()}
        with undisturbed(self.module, at_rest), self.recording() as prints:
            self.module(*by_place, **by_name)
        return prints

    def _variants(self, pair: Inputs) -> Iterator[Inputs]:
        """Two rows as they are shown to the model, until it takes them: other than each other, one of them padded."""
        if has_no_values(*pair.values()):
            yield pair
            return
        drawn = pair | self._drawn(pair)
        mask = pair.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape[1] > 1:
            padded = mask.clone()
            padded[0, -1] = 0
            yield drawn | {"attention_mask": padded}
        yield drawn
        yield pair

    def _drawn(self, inputs: Inputs, seed: int = 0, names: Sequence[str] = ()) -> Inputs:
        """Other values for what rows say: ids as large as any that is known, or normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name in names or (self.call.main, *_TOKENS):
            value = inputs.get(name)
            if not isinstance(value, Tensor) or not value.numel():
                continue
            if value.is_floating_point():
                other = torch.randn(value.shape, generator=generator).to(value)
            else:
                bound = max(int(value.max()) + 1, min(self._vocabulary(), 2 + int(value.max())))
                other = torch.randint(bound, value.shape, generator=generator).to(value)
                keep = self._stands_for_item(value)
                other = torch.where(keep, value, other.masked_fill(self._stands_for_item(other), self._plain_token()))
            drawn[name] = other
        return drawn

    def _vocabulary(self) -> int:
        return int(getattr(getattr(self.module, "config", None), "vocab_size", None) or 0)

    def _stands_for_item(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.item_tokens, device=ids.device, dtype=ids.dtype))

    def _plain_token(self) -> int:
        return next(token for token in range(len(self.item_tokens) + 1) if token not in self.item_tokens)

    def _unlike_rows(self, inputs: Inputs) -> list[int]:
        """Two rows that differ in length where a mask tells it; one of them twice where there is no other."""
        mask = inputs.get("attention_mask")
        if self.call.has_rows(mask) and not has_no_values(mask):
            lengths = mask.sum(dim=1).tolist()
            if min(lengths) < max(lengths):
                return [lengths.index(min(lengths)), lengths.index(max(lengths))]
        return [0, min(1, self.call.num_rows - 1)]

    def _refuse_parts(self, layouts: dict[str, Layout | str], alone: Prints, pair: Inputs, shown: Inputs) -> None:
        """Refuse modules whose number of elements depends on what rows say, as an expert's does.

        It gets all or none of a row whose tokens are alike, and other numbers of what the rows of the batch say.
        """
        main, row = self.call.main, rows_of_input(shown, [0], 2)
        others = [(2, pair)]
        if isinstance(row.get(main), Tensor):
            value = row[main]
            others.append((1, row | {main: value.flatten()[0].expand_as(value).clone()}))
        if isinstance(row.get("attention_mask"), Tensor):
            # A row of one token could not be padded before.
            others.append((1, row | {"attention_mask": torch.zeros_like(row["attention_mask"])}))
        for rows, inputs in others:
            try:
                prints = self.prints(rows_of_input(inputs, list(range(rows)), rows))
            except Exception:
                continue
            for name, layout in layouts.items():
                found = [len(x) for x in prints.get(name, [])]
                if not isinstance(layout, str) and found != [rows * len(x) for x in alone[name]]:
                    layouts[name] = "the number of its elements depends on what the rows say"

    def _refuse_other_orders(self, layouts: dict[str, Layout | str], runs: Sequence[Prints], shown: Inputs) -> None:
        """Refuse modules whose rows lie in another order in training, as far as dropout lets it be seen."""
        several = [name for name, layout in layouts.items() if isinstance(layout, Layout) and max(layout.sizes) > 1]
        if not several:
            return
        trained = self.prints(rows_of_input(shown, [0, 1], 2), at_rest=False)
        for name in several:
            layout = layouts[name]
            assert isinstance(layout, Layout)
            for first, second, together in zip(runs[0][name], runs[1][name], trained.get(name, []), strict=False):
                distances = [
                    float((_joined(first, second, in_blocks).double() - together.double()).abs().mean())
                    for in_blocks in (layout.in_blocks, not layout.in_blocks)
                    if together.shape[0] == 2 * first.shape[0]
                ]
                if not distances or distances[1] < distances[0]:
                    layouts[name] = "its elements lie otherwise in training"

    def _refuse_partners(self, layouts: dict[str, Layout | str], both: Prints, shown: Inputs) -> None:
        """Refuse modules that get what only happens to be as many as rows: the model can do with fewer."""
        for name, value in shown.items():
            if name in _BY_ROW or name == self.call.main or not isinstance(value, Tensor) or value.shape[:1] != (2,):
                continue
            try:
                fewer = self.prints(shown | {name: value[:1]})
            except Exception:
                # Each row needs its own.
                continue
            for position, prints in fewer.items():
                if [len(x) for x in prints] != [len(x) for x in both.get(position, [])]:
                    layouts[position] = f"{name} need not have as many as there are rows"

    def _with_laws(self, layouts: dict[str, Layout | str], alone: Prints, row: Inputs) -> dict[str, Layout | str]:
        """What the numbers of elements are for every length, from one run with another."""
        lengths = {name: value.shape[1] for name, value in row.items() if _is_of_tokens(name, value, row)}
        runs = []
        for changed in (lambda value: torch.cat([value] * 3, dim=1), lambda value: value[:, : -(-value.shape[1] // 2)]):
            other = {name: changed(row[name]) for name in lengths}
            try:
                prints = self.prints(row | other) if lengths else {}
            except Exception:
                continue
            runs.append(({name: value.shape[1] for name, value in other.items()}, prints))
        return {
            name: layout if isinstance(layout, str) else _with_law(layout, name, lengths, runs)
            for name, layout in layouts.items()
        }


def _with_law(
    layout: Layout, name: str, lengths: Mapping[str, int], runs: Sequence[tuple[Mapping[str, int], Prints]]
) -> Layout:
    found = [(others, {len(x) for x in prints.get(name, [])}) for others, prints in runs]
    if len({tuple(others.values()) for others, _ in found} | {tuple(lengths.values())}) < 2:
        return layout
    laws = {
        key
        for key, length in lengths.items()
        if {length} == layout.sizes and all({others[key]} == sizes for others, sizes in found)
    }
    is_constant = all(sizes == layout.sizes for _, sizes in found)
    return replace(layout, lengths=frozenset(laws), is_constant=is_constant)


def _layout(alone: list[Tensor], other: list[Tensor], both: list[Tensor], swapped: list[Tensor]) -> Layout | str:
    """How rows lie in the calls of one module: on one row, on another, and on both in either order."""
    if not len(alone) == len(other) == len(both) == len(swapped):
        return "it is called more often for some rows than for others"
    sizes: set[int] = set()
    orders: set[bool] = set()
    for first, second, together, turned in zip(alone, other, both, swapped, strict=True):
        size = first.shape[0]
        if not size or second.shape != first.shape or together.shape[0] != 2 * size or turned.shape != together.shape:
            return "its first dimension does not grow evenly with the rows"
        if together.shape[1] != first.shape[1]:
            return "its other dimensions depend on the other rows"
        fitting = [
            in_blocks
            for in_blocks in ([False, True] if size > 1 else [False])
            if _is_close(_joined(first, second, in_blocks), together)
            and _is_close(_joined(second, first, in_blocks), turned)
        ]
        if not fitting:
            return "its elements depend on other rows, or are in another order"
        if len(fitting) > 1:
            return "the order of its elements cannot be seen"
        sizes.add(size)
        orders.update(fitting if size > 1 else [])
    return "its calls have rows in different orders" if len(orders) > 1 else Layout(frozenset(sizes), orders == {True})


def _joined(first: Tensor, second: Tensor, in_blocks: bool) -> Tensor:
    return torch.stack([first, second], dim=1).flatten(0, 1) if in_blocks else torch.cat([first, second])


def _is_of_tokens(name: str, value: Any, row: Inputs) -> bool:
    """Whether the second dimension of an input is of tokens, so that it may be shorter."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    if name in _TOKENS or name.isdigit() or name in ("input_values", "decoder_attention_mask"):
        return value.ndim == 2 or name.endswith("embeds")
    tokens = [row[key].shape[1] for key in _TOKENS if isinstance(row.get(key), Tensor)]
    return name in ("attention_mask", "token_type_ids", "labels") and value.shape[1] in tokens


def _is_close(x: Tensor, y: Tensor) -> bool:
    """Whether prints are the same but for rounding: a tenth of what elements differ by, or half of the digits."""
    if x.shape != y.shape or has_no_values(x):
        return x.shape == y.shape
    rounding = torch.finfo(y.dtype).eps ** 0.5 if y.is_floating_point() else 0.0
    x, y = x.double().nan_to_num(), y.double().nan_to_num()
    # For each value by itself: one that is large in all elements must not hide the others.
    spread, scale = y.amax(dim=0) - y.amin(dim=0), y.abs().amax(dim=0)
    return bool(((x - y).abs() <= 0.1 * spread + rounding * scale).all())
