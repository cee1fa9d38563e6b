"""One forward pass as data: the factors generated for it, and which task each row of an activation uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.layouts import Call
from hyperadapt.routing.requests import Request

# What the PeftModel takes and its base model does not.
ROUTING_ARGUMENTS = ("tasks", "task_embeddings", "task_rows")
MISSPELLED = dict.fromkeys(("task", "task_id", "task_ids", "task_name", "task_names"), "tasks") | {
    "task_embedding": "task_embeddings",
    "task_row": "task_rows",
}


@dataclass(frozen=True)
class Routed:
    """Generated factors by position name, and which of them each row of the batch uses.

    Args:
        factors: By position name, of several tasks.
        rows: The task of each row, int64 of shape ``(batch,)``; None if there is one for all.
        is_one_to_one: Whether each row has a task of its own, in order.
    """

    factors: dict[str, Factors]
    rows: Tensor | None
    is_one_to_one: bool = False


@dataclass(eq=False)
class ForwardPass:
    """One forward (or generate) call, or all calls inside of ``use_tasks``.

    Args:
        routed: Factors and rows by adapter name; without an adapter, its layers generate their own.
        request: What was asked for.
        options: The arguments of the call, which say how generate repeats rows.
        is_counted: Whether the number of rows was compared with the batch.
        call: The call of the base model that runs now, or of a part.
        num_rows: Rows of the calls of the base model so far; None before the first.
        prints: Where layers note what they get, and then do nothing; None except while layouts are learned.
    """

    routed: dict[str, Routed]
    request: Request = field(default_factory=Request)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_counted: bool = False
    call: Call | None = None
    num_rows: int | None = None
    prints: dict[str, list[Tensor]] | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether rows may have different tasks; where processes work together, all do the same."""
        if not self.routed or _works_together():
            return self.request.num_rows is not None and (self.request.num_rows > 1 or _works_together())
        return any(routed.rows is not None for routed in self.routed.values())

    def count(self, num_rows: int) -> None:
        """Refuse a batch of another number of rows than tasks were given for."""
        if self.request.num_rows not in (None, num_rows):
            raise ValueError(
                f"Got tasks for {self.request.num_rows} rows, but the batch has {num_rows}. Pass one task per row, or "
                "one name for all rows."
            )
        self.is_counted = True

    def observe(self, call: Call) -> None:
        """Note a call of the base model, whose rows generate may have repeated."""
        # The request is not looked at twice: a graph would be made for each way to ask.
        if not self.is_counted:
            self.count(call.num_rows)
        if not call.path:
            if self.num_rows not in (None, call.num_rows) and type(self) is ForwardPass:
                call.problem = "rows have left the batch since generate began"
            self.num_rows = call.num_rows
        self.call = call

    def rows_of(self, rows: Tensor, x: Tensor, position: Position) -> Tensor:
        """The task of each element of an activation's first dimension, shape ``(len(x),)``."""
        try:
            told = self.request.rows_told(position.name, x.shape[0]) if self.request.task_rows else None
            if told is not None:
                return rows[told.to(rows.device)]
            if self.call is None:
                raise ValueError("it is called by itself")
            return self.call.elements(self._repeated(rows, self.call.num_rows), position.name, x.shape[0])
        except ValueError as error:
            raise ValueError(
                f"Module {position.name!r} got an input of shape {tuple(x.shape)}, in which the {len(rows)} rows that "
                f"tasks were given for cannot be told apart: {error}. Leave the module out with exclude_modules, use "
                "one task per batch, or tell the row of each element with task_rows."
            ) from error

    def _repeated(self, rows: Tensor, size: int) -> Tensor:
        """The task of each row of the call: as given, or as generate repeats rows for beams, samples and guidance."""
        num_rows = rows.shape[0]
        if size == num_rows:
            return rows
        beams = max(self._option("num_beams") or 1, self._option("num_return_sequences") or 1)
        is_guided = (self._option("guidance_scale") or 1) > 1
        if size == num_rows * beams:
            return rows.repeat_interleave(beams)
        if is_guided and size == 2 * num_rows * beams:
            return rows.repeat_interleave(beams).repeat(2)
        raise ValueError(f"the base model was called with {size} rows, which is not what generate makes of them")

    def _option(self, name: str) -> Any:
        """A setting of generate: its own argument, or else that of the configuration given, or of the model."""
        configs = (self.options.get("generation_config"), self.options.get("default_generation_config"))
        values = (self.options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)


def _works_together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def main_input(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, Tensor] | tuple[None, None]:
    """Name (or place) and value of the input that tells a model's rows, if there is one."""
    named = (getattr(model, "main_input_name", "input_ids"), "inputs", "input_ids", "inputs_embeds")
    decoder = ("encoder_outputs", "decoder_input_ids", "decoder_inputs_embeds")
    candidates = {"0": args[0] if args else None} | {name: kwargs.get(name) for name in (*named, *decoder)}
    for name, value in (candidates | dict(kwargs)).items():
        first = value[0] if name == "encoder_outputs" and value is not None else value
        if isinstance(first, Tensor) and first.ndim:
            return name, first
    return None, None


# Other inputs with the rows of a main input.
_SAME_ROWS = {"input_ids": ("inputs_embeds",)}


def _spelled(part: nn.Module, name: str) -> str:
    """Name of an input that may be given by place."""
    return list(inspect.signature(part.forward).parameters)[int(name)] if name.isdigit() else name


def check_spelling(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse what was meant as an argument of ours, and which a model with ``**kwargs`` would ignore."""
    for name in MISSPELLED.keys() & kwargs.keys():
        if name not in inspect.signature(model.forward).parameters:
            raise TypeError(f"{name}={kwargs[name]!r} is no argument of the model. Did you mean {MISSPELLED[name]}=?")


def call_of(
    path: str, part: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module
) -> Call | None:
    """A call of a part of the base model; None if it has no input with rows."""
    lost = [name for name in ROUTING_ARGUMENTS if name in kwargs]
    if lost and lost[0] not in inspect.signature(part.forward).parameters:
        raise TypeError(
            f"{lost[0]}= was given to {type(part).__name__}, which would ignore it. Give it to the PeftModel, or "
            "call the base model inside of use_tasks."
        )
    name, main = main_input(part, args, kwargs)
    if name is None or main is None:
        return None
    call = Call(path, {**{str(place): value for place, value in enumerate(args)}, **kwargs}, name, main.shape[0])
    expected = getattr(model, "main_input_name", name)
    if path and _spelled(part, name) not in (expected, *_SAME_ROWS.get(expected, ())):
        call.problem = f"{path} is called by itself, and its rows need not be those of {expected}"
    return call
