"""What an adapter was made for, its base model and the adapted modules: saved with it, so that no base is needed."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from hyperadapt.config.checks import check_choice, check_integer, check_type, checked_names, shown

KINDS = ("Linear", "Conv1D", "Embedding", "Convolution", "Experts")
LIBRARIES = ("transformers", "diffusers")
# Far above any vocabulary.
_MAX_FEATURES = 2**31 - 1
_MAX_LAYERS = 2**20


class _Saved:
    """A record that is saved as a dict, without what has its default."""

    @classmethod
    def checked(cls, field: str, value: Any) -> Self:
        """The record that a part of a configuration's field holds."""
        known = {one.name: one.default is MISSING for one in fields(cls)}  # type: ignore[arg-type]
        check_type(f"An entry of {field}", value, dict, "a dict", optional=False)
        if not {name for name, is_needed in known.items() if is_needed} <= value.keys() <= known.keys():
            raise ValueError(
                f"An entry of {field} is {shown(value)}, but must have the fields {', '.join(known)}. The file is "
                "damaged, or was saved by a newer hyperadapt."
            )
        return cls(**value)

    def saved(self) -> dict[str, Any]:
        """What ``checked`` makes it of again."""
        return {
            one.name: list(value) if isinstance(value, tuple) else value
            for one, value in zip(fields(self), asdict(self).values(), strict=True)  # type: ignore[arg-type,call-overload]
            if value != one.default
        }


@dataclass(frozen=True)
class AdaptedModel(_Saved):
    """What exports and cards tell of a base model.

    ``kind`` is the name of its class, ``library`` where that is from (None for any but two), ``config`` what its
    config.json holds (None if it is no model of transformers), ``decoder_layers`` the number of modules in
    ``model.layers``; ``has_own_endings`` tells whether the last components of the adapted modules' names are those
    of no other module; ``trained_modules`` are the paths of modules that are trained in full, and ``embeddings`` those
    that PEFT may save along.
    """

    kind: str
    library: str | None = None
    config: dict[str, Any] | None = None
    dtype: str | None = None
    has_text: bool = False
    num_labels: int | None = None
    decoder_layers: int | None = None
    has_own_endings: bool = False
    trained_modules: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Both become part of code that a card shows.
        for name in ("kind", "dtype"):
            value = getattr(self, name)
            check_type(name, value, str, "a name", optional=name == "dtype")
            if value is not None and not value.isidentifier():
                raise ValueError(f"{name}={shown(value)} of adapted_model is no name in Python.")
        check_choice("library", self.library, (*LIBRARIES, None))
        check_type("config", self.config, dict, "a dict")
        for name in ("has_text", "has_own_endings"):
            check_type(name, getattr(self, name), bool, "True or False", optional=False)
        for name in ("num_labels", "decoder_layers"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), _MAX_FEATURES)
        for name in ("trained_modules", "embeddings"):
            object.__setattr__(self, name, tuple(checked_names(name, getattr(self, name))))


@dataclass(frozen=True)
class AdaptedModule(_Saved):
    """A module as a block of layers has it: ``*`` is the layer's index in its path.

    ``kernel`` is the shape of a convolution's weight without the output channels, ``experts`` how many matrices a
    parameter of experts holds.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = "Linear"
    kernel: tuple[int, ...] | None = None
    padding_idx: int | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        check_type("name", self.name, str, "a string", optional=False)
        check_integer("in_features", self.in_features, _MAX_FEATURES)
        check_integer("out_features", self.out_features, _MAX_FEATURES)
        check_choice("kind", self.kind, KINDS)
        if self.kernel is not None:
            check_type("kernel", self.kernel, list | tuple, "a list", optional=False)
            for size in self.kernel:
                check_integer("kernel", size, _MAX_FEATURES)
            object.__setattr__(self, "kernel", tuple(self.kernel))
        shape = self.kernel if self.kind == "Convolution" else None
        is_convolution = shape is not None and 2 <= len(shape) <= 4 and math.prod(shape) == self.in_features
        if is_convolution != (self.kind == "Convolution") or (self.kernel is not None and shape is None):
            raise ValueError(
                f"kernel={shown(self.kernel)} of module {shown(self.name)} is not that of a {self.kind} with "
                f"{self.in_features} inputs."
            )
        if self.padding_idx is not None:
            check_type("padding_idx", self.padding_idx, int, "an integer", optional=False)
            if self.kind != "Embedding" or not 0 <= self.padding_idx < self.in_features:
                raise ValueError(f"padding_idx={shown(self.padding_idx)} is none of module {shown(self.name)}.")
        if self.experts is not None:
            check_integer("experts", self.experts)
        if (self.experts is None) == (self.kind == "Experts"):
            raise ValueError(f"experts={shown(self.experts)} of {shown(self.name)} is not that of a {self.kind}.")


@dataclass(frozen=True)
class AdaptedLayers(_Saved):
    """Layers that have the same adapted modules: first and last index, or None for modules outside of layers."""

    modules: tuple[AdaptedModule, ...]
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_type("modules", self.modules, list | tuple, "a list", optional=False)
        modules = [
            one if isinstance(one, AdaptedModule) else AdaptedModule.checked("adapted_modules", one)
            for one in self.modules
        ]
        object.__setattr__(self, "modules", tuple(modules))
        if self.layers is None:
            return
        check_type("layers", self.layers, list | tuple, "a list", optional=False)
        for index in self.layers:
            check_type("layers", index, int, "a list of integers", optional=False)
        if len(self.layers) != 2 or not 0 <= self.layers[0] <= self.layers[1] <= _MAX_LAYERS:
            raise ValueError(f"layers={shown(self.layers)} of adapted_modules must be a first and a last index.")
        object.__setattr__(self, "layers", tuple(self.layers))

    def saved(self) -> dict[str, Any]:
        """As ``checked`` takes it."""
        modules = [one.saved() for one in self.modules]
        return {"modules": modules} if self.layers is None else {"layers": list(self.layers), "modules": modules}

    @property
    def indices(self) -> range | list[None]:
        """Of the layers."""
        return [None] if self.layers is None else range(self.layers[0], self.layers[1] + 1)


def checked_adapted_layers(value: Any) -> list[AdaptedLayers]:
    """What the field `adapted_modules` holds, in the order of the positions."""
    check_type("adapted_modules", value, list, "a list", optional=False)
    return [AdaptedLayers.checked("adapted_modules", one) for one in value]
