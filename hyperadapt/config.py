"""The configuration of a hyperadapter: a ``PeftConfig`` that is checked when it is made."""

from __future__ import annotations

import enum
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

HEADS = ("row", "factor", "pair")
# Of each normalisation, the options it takes and their defaults; in the config they are called normalization_<option>.
NORMALIZATION_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "soft_frobenius": {"bound": 0.5},
    "frobenius_clip": {"bound": 0.5},
    "adaptive": {"bound": 0.5},
    "frobenius": {},
    "spectral": {},
    "schatten": {"order": 8},
    "polar": {"ridge": 1e-5},
    "whitening": {"ridge": 1e-5, "factors": "both"},
    "weight_norm": {},
    "sinkhorn": {"iterations": 20, "temperature": 1.0},
}
NORMALIZATIONS = tuple(NORMALIZATION_OPTIONS)
BOUNDED_NORMALIZATIONS = tuple(name for name, options in NORMALIZATION_OPTIONS.items() if "bound" in options)
UNIT_NORMALIZATIONS = tuple(name for name in NORMALIZATIONS if name not in ("none", *BOUNDED_NORMALIZATIONS))


# Not StrEnum: PEFT reads the member's name from str(), "HyperAdapterType.HYPERADAPTER".
class HyperAdapterType(str, enum.Enum):  # noqa: UP042
    """PEFT type of this method, beside PEFT's own closed ``PeftType`` enum."""

    HYPERADAPTER = "HYPERADAPTER"


@dataclass
class HyperAdapterConfig(PeftConfig):
    """Configuration of a hyperadapter: one hypernetwork that generates a LoRA pair for every task and position.

    Args:
        r: Rank of every generated adapter.
        rank_pattern: Other ranks for some modules, by name ending or regular expression, as in ``LoraConfig``.
        alpha_pattern: Other values of `lora_alpha` for some modules, likewise.
        lora_alpha: The update is scaled by ``lora_alpha / r`` before it is normalised. Unit
            normalisations remove every scale, so it has no effect with them.
        lora_dropout: Dropout probability on the input of the generated adapters.
        target_modules: Module names (or name endings), a regular expression, ``"all-linear"``, or
            None for PEFT's default for the architecture.
        exclude_modules: Module names (or name endings) or a regular expression to leave out.
        layers_to_transform: Layer indices to adapt; None adapts all. Needs `target_modules` as a list.
        layers_pattern: Name of the module list that holds the layers, if it cannot be guessed.
        modules_to_save: Modules that are trained in full and saved with the adapter.
        bias: Only ``"none"``.
        tasks: Task names, or a dict from task name to description; the order gives the task ids. After
            construction always the list of names.
        task_descriptions: Description of each task; filled from `tasks` if that is a dict.
        default_task: Task of calls that name none; None takes the first.
        task_embedding_dim: Size of a task embedding (and of the layer and module embeddings).
        hypernetwork_dim: Hidden size of the hypernetwork's trunk.
        hypernetwork_depth: Number of residual blocks of the trunk.
        head: What one head emits at once: ``"row"`` (one row of A or column of B), ``"factor"`` (A or
            B, shared by all positions with that size), ``"pair"`` (A and B, one head per module shape).
        normalization: How every generated update is normalised; see ``docs/normalization.md`` for the
            methods. The options below belong to some of them; None takes the method's default.
        normalization_bound: Bound on ‖ΔW‖_F in units of the base weight's ‖W₀‖_F (dimensionless), for
            ``"soft_frobenius"``, ``"frobenius_clip"`` and ``"adaptive"`` (there where it starts).
        normalization_ridge: Ridge of ``"polar"`` and ``"whitening"``, relative to the mean eigenvalue of a
            Gram matrix.
        normalization_factors: ``"both"`` or ``"A"``: which factors ``"whitening"`` whitens.
        normalization_order: Order of the Schatten norm of ``"schatten"``, a power of 2.
        normalization_iterations: Iterations of ``"sinkhorn"``.
        normalization_temperature: Temperature of ``"sinkhorn"``.
        init_weights: True starts exactly at the base model in the way that suits the normalisation;
            ``"zero_head"`` (heads of B start at zero) and ``"zero_gain"`` (gains start at zero) name
            that way; False starts with a random update (for tests).

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a value, or a combination of values, is impossible.
    """

    r: int = field(default=8, metadata={"help": "Rank of every generated adapter."})
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by module name ending or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other values of lora_alpha, by the same."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regular expression, 'all-linear' or None."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the layers."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    bias: str = field(default="none", metadata={"help": "Only 'none'."})
    tasks: list[str] | dict[str, str] = field(
        default_factory=lambda: ["default"], metadata={"help": "Task names, or task name -> description."}
    )
    task_descriptions: dict[str, str] | None = field(default=None, metadata={"help": "Task name -> description."})
    default_task: str | None = field(default=None, metadata={"help": "Task of calls that name none."})
    task_embedding_dim: int = field(default=64, metadata={"help": "Size of a task embedding."})
    hypernetwork_dim: int = field(default=64, metadata={"help": "Hidden size of the trunk."})
    hypernetwork_depth: int = field(default=2, metadata={"help": "Residual blocks of the trunk."})
    head: str = field(default="factor", metadata={"help": "What one head emits: 'row', 'factor' or 'pair'."})
    normalization: str = field(default="soft_frobenius", metadata={"help": f"One of {', '.join(NORMALIZATIONS)}."})
    normalization_bound: float | None = field(
        default=None,
        metadata={"help": "Bound on the update's Frobenius norm, in units of the base weight's."},
    )
    normalization_ridge: float | None = field(
        default=None, metadata={"help": "Ridge of polar and whitening, relative to the mean eigenvalue."}
    )
    normalization_factors: str | None = field(
        default=None, metadata={"help": "Which factors whitening whitens: 'both' or 'A'."}
    )
    normalization_order: int | None = field(
        default=None, metadata={"help": "Order of the Schatten norm, a power of 2."}
    )
    normalization_iterations: int | None = field(default=None, metadata={"help": "Iterations of sinkhorn."})
    normalization_temperature: float | None = field(default=None, metadata={"help": "Temperature of sinkhorn."})
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True, 'zero_head' or 'zero_gain' (start at the base model) or False."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = HyperAdapterType.HYPERADAPTER
        for name in ("r", "task_embedding_dim", "hypernetwork_dim", "hypernetwork_depth"):
            _check_positive_integer(name, getattr(self, name))
        _check_number("lora_alpha", self.lora_alpha, "a finite number above 0", lambda value: value > 0)
        _check_number("lora_dropout", self.lora_dropout, "in [0, 1)", lambda value: 0 <= value < 1)
        _check_choice("head", self.head, HEADS)
        _check_choice("normalization", self.normalization, NORMALIZATIONS)
        self._check_modules()
        self._check_normalization_options()
        self._check_start()
        self._check_tasks()

    @property
    def task_names(self) -> list[str]:
        """The task names; a task's id is its place here."""
        return list(self.tasks)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Rank and scaling at a module, with `rank_pattern` and `alpha_pattern`.

        Args:
            name: Path of the module in the base model.

        Returns:
            The rank r, and the factor ``lora_alpha / r`` on the generated update (dimensionless).
        """
        r: int = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        alpha: float = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        return r, alpha / r

    @property
    def has_gain(self) -> bool:
        """Whether a learned gain per position follows the normalisation."""
        if self.normalization == "adaptive":
            return self.init_weights == "zero_gain"
        return self.normalization in UNIT_NORMALIZATIONS and self.normalization_factors != "A"

    @property
    def normalization_options(self) -> dict[str, Any]:
        """The options of the normalisation, by name without the prefix."""
        names = NORMALIZATION_OPTIONS[self.normalization]
        return {name: getattr(self, f"normalization_{name}") for name in names}

    @property
    def has_zero_heads(self) -> bool:
        """Whether the heads that emit B start at zero."""
        return bool(self.init_weights) and not self.has_gain

    def _check_modules(self) -> None:
        if self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} is not supported: a hyperadapter generates weights, not biases. Use bias='none'; "
                "to train a module in full, name it in modules_to_save."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be used with "
                f"target_modules={self.target_modules!r}: indices select among listed names. Pass target_modules as "
                "a list, or put the layers into the regular expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform. Pass the layer "
                "indices as layers_to_transform, or drop layers_pattern."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check_normalization_options(self) -> None:
        defaults = NORMALIZATION_OPTIONS[self.normalization]
        for option in sorted({name for options in NORMALIZATION_OPTIONS.values() for name in options}):
            name = f"normalization_{option}"
            value = getattr(self, name)
            if option not in defaults:
                if value is not None:
                    takers = [method for method, options in NORMALIZATION_OPTIONS.items() if option in options]
                    raise ValueError(
                        f"{name}={value!r} has no effect with normalization={self.normalization!r}. Drop it, or choose "
                        f"one of {', '.join(takers)}."
                    )
            elif value is None:
                setattr(self, name, defaults[option])
            elif option in ("bound", "ridge", "temperature"):
                _check_number(name, value, "a finite number above 0", lambda value: value > 0)
            elif option == "factors":
                _check_choice(name, value, ("both", "A"))
            else:
                _check_positive_integer(name, value)
        if self.normalization_order is not None and self.normalization_order not in (2, 4, 8, 16, 32):
            raise ValueError(f"normalization_order={self.normalization_order} must be 2, 4, 8, 16 or 32.")

    def _check_start(self) -> None:
        if isinstance(self.init_weights, bool):
            return
        _check_choice("init_weights", self.init_weights, (True, False, "zero_head", "zero_gain"))
        if self.init_weights == "zero_head" and self.has_gain:
            raise ValueError(
                f"init_weights='zero_head' is impossible with normalization={self.normalization!r}: the unit norm of "
                "a zero matrix is undefined and its gradient is infinite. Use init_weights='zero_gain' (or True), or "
                f"a bounded normalization ({', '.join(BOUNDED_NORMALIZATIONS)})."
            )
        if self.init_weights == "zero_gain" and not self.has_gain:
            factors = " and normalization_factors='A'" if self.normalization_factors == "A" else ""
            raise ValueError(
                f"init_weights='zero_gain' is impossible with normalization={self.normalization!r}{factors}, which has "
                "no gain. Use init_weights='zero_head' (or True), or a unit normalization "
                f"({', '.join(UNIT_NORMALIZATIONS)})."
            )

    def _check_tasks(self) -> None:
        if isinstance(self.tasks, dict):
            if self.task_descriptions is not None:
                raise ValueError(
                    f"tasks={self.tasks!r} already gives descriptions, and so does task_descriptions. Pass one of the "
                    "two."
                )
            self.task_descriptions = dict(self.tasks)
            # A list keeps its order in JSON; PEFT saves dicts sorted by key, which would renumber the tasks.
            self.tasks = list(self.tasks)
        if not isinstance(self.tasks, list | tuple):
            raise TypeError(
                f"tasks={self.tasks!r} must be a list of names or a dict from name to description, not "
                f"{type(self.tasks).__name__}."
            )
        self.tasks = list(self.tasks)
        if not self.tasks:
            raise ValueError(
                "tasks=[] names no task. Name at least one, or leave the field out for one task 'default'."
            )
        for name in self.tasks:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"tasks={self.tasks!r} holds {name!r}; every task needs a non-empty name.")
        duplicates = [name for name, count in Counter(self.tasks).items() if count > 1]
        if duplicates:
            raise ValueError(f"tasks={self.tasks!r} names {duplicates} more than once; task names must be unique.")
        self._check_task_descriptions(self.tasks)
        if self.default_task is None:
            self.default_task = self.tasks[0]
        elif self.default_task not in self.tasks:
            raise ValueError(
                f"default_task={self.default_task!r} is not among the tasks {self.tasks}. Name one of them."
            )

    def _check_task_descriptions(self, tasks: list[str]) -> None:
        if self.task_descriptions is None:
            return
        if not isinstance(self.task_descriptions, dict):
            raise TypeError(
                f"task_descriptions={self.task_descriptions!r} must be a dict from task name to description, "
                f"not {type(self.task_descriptions).__name__}."
            )
        self.task_descriptions = dict(self.task_descriptions)
        for name, description in self.task_descriptions.items():
            if name not in tasks:
                raise ValueError(
                    f"task_descriptions describes {name!r}, which is not among the tasks {tasks}. Add it to "
                    "tasks, or drop its description."
                )
            if not isinstance(description, str) or not description.strip():
                raise ValueError(f"The description of task {name!r} is {description!r}; write a non-empty text.")


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def _check_number(name: str, value: Any, rule: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name}={value} must be {rule}.")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}.")
