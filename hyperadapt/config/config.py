"""The configuration of a hyperadapter: a ``PeftConfig`` that is checked when it is made."""

from __future__ import annotations

import copy
import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor

from hyperadapt.config.adapted_fields import AdaptedLayers, AdaptedModel, checked_adapted_layers
from hyperadapt.config.checks import (
    MAX_DEPTH,
    check_choice,
    check_integer,
    check_number,
    check_type,
    refuses_unknown_fields,
)
from hyperadapt.config.label_fields import Labels, all_names, by_output, checked_task_labels, of_outputs
from hyperadapt.config.module_fields import (
    check_bias,
    check_pattern,
    checked_layers,
    checked_modules,
    checked_modules_to_save,
    checked_parameters,
    value_at,
)
from hyperadapt.config.normalization_fields import check_start, checked_options
from hyperadapt.config.task_fields import (
    EXAMPLES,
    TEXT,
    check_compared_sizes,
    check_example_fields,
    check_text_fields,
    checked_own_factors,
    checked_sources,
    checked_tasks,
    descriptions_of,
    encoder_name,
)
from hyperadapt.normalization.formulas import METHODS, NORMALIZATIONS
from hyperadapt.normalization.methods import OPTIONS, default_bound

CONDITIONINGS = ("additive", "gated", "bilinear")
HEADS = ("row", "factor", "pair")
# PEFT stops with a bare KeyError where the package is not imported: this stands beside `peft_type` in the file.
PLUGIN = "pip install hyperadapt, then import hyperadapt before loading this adapter"


# Not StrEnum: PEFT reads the member's name from str(), "HyperAdapterType.HYPERADAPTER".
class HyperAdapterType(str, enum.Enum):  # noqa: UP042
    """PEFT type of this method, beside PEFT's own closed ``PeftType`` enum."""

    HYPERADAPTER = "HYPERADAPTER"


@refuses_unknown_fields
@dataclass
class HyperAdapterConfig(PeftConfig):
    """Configuration of a hyperadapter: one hypernetwork that generates a LoRA pair for every task and position.

    Args:
        r: Rank of every generated adapter.
        rank_pattern: Other ranks for some modules, by name ending or regular expression, as in ``LoraConfig``; the
            patterns that match one module must agree.
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
        target_parameters: Parameters of fused experts, by name endings such as ``"experts.gate_up_proj"``: stacks of
            matrices ``(experts, ..., ...)``, each of which gets factors of its own; see ``docs/experts.md``. As with
            ``LoraConfig``, ``target_modules=[]`` adapts nothing else.
        bias: Only ``"none"``.
        tasks: Task names, or a dict from task name to a description or a list of them; the order gives the task ids.
            After construction always the list of names.
        task_descriptions: The same dict; filled from `tasks` if that is one. Of several descriptions of a task
            training draws one each time; else their mean counts.
        task_labels: Of a classifier, task name -> labels: a dict from output of the classifier to name, or a list of
            names that outputs have in the base model's ``id2label``; where those have no names, a list with one for
            each. Only a task's own labels compete; see ``docs/classifier-labels.md``. After the adapter is made always
            dicts.
        own_factors: Tasks that have factors of their own, as many numbers as a LoRA, which are added to the generated
            ones before these are normalised. Filled in by ``HyperAdapterModel.add_own_factors``.
        default_task: Task of calls that name none. None takes the first, but then refuses to train several tasks
            without being told which.
        task_embedding: Where a task's embedding comes from: ``"learned"``, ``"text"`` (a projection of its
            description's vector), ``"both"`` (their sum), ``"examples"`` (what an encoder makes of labelled rows, see
            ``HyperAdapterModel.set_examples``) or ``"text+examples"`` (the sum of those two); or a dict from task name
            to one of these.
        text_encoder: Makes vectors of descriptions: name or folder of a sentence-transformers model, or a function from
            a list of texts to a tensor of shape ``(texts, dim)``. Asked once, when the adapter is made; the vectors are
            saved with it.
        text_encoder_revision: Revision of a model on the Hub; filled in when the adapter is made.
        text_embedding_dim: Size of a vector; filled in when the adapter is made.
        example_dim: Size of the base model's vector of a row; filled in when the adapter is made.
        example_classes: Number of the classes that examples may have; None for pairs of prompt and completion.
        task_embedding_dim: Size of a task embedding (and of the layer and module embeddings).
        hypernetwork_dim: Hidden size of the hypernetwork's trunk.
        hypernetwork_depth: Number of residual blocks of the trunk.
        conditioning: How the task embedding enters: ``"gated"`` (beside those of layer and module, and it multiplies
            the trunk's output: tasks differ more, and new ones are fitted better), ``"additive"`` (only beside), or
            ``"bilinear"`` (gated, and where linear layers read vectors of size `task_embedding_dim`, of which there has
            to be one, a row of A is made of the embedding itself, to be compared with them; vectors of descriptions
            need to have that size, and are embeddings without a projection; examples with classes start as the contrast
            of these; see ``docs/conditioning.md``).
        head: What one head emits at once: ``"row"`` (one row of A or column of B), ``"factor"`` (A or
            B, shared by all positions with that size), ``"pair"`` (A and B, one head per module shape).
        normalization: How every generated update is normalised; see ``docs/normalization.md`` for the
            methods. The options below belong to some of them; None takes the method's default.
        normalization_bound: Bound on ‖ΔW‖_F in units of the base weight's ‖W₀‖_F (dimensionless), for all but
            ``"none"`` and ``"whitening"`` of A alone. Unit normalisations keep it by bounding their gain;
            ``"adaptive"`` learns one below it for each position. None is filled in when the adapter is made: 0.2 for
            up to six adapted modules, and 0.2·√(6/n) for n.
        normalization_warmup: Optimizer steps N over which the bound of a method that starts at the base model without a
            gain grows, from its N-th part, so that a high learning rate does not throw the update to its bound in the
            first step; 1 for none. A step of any ``torch.optim`` optimizer counts that follows a forward pass in
            training mode.
        normalization_ridge: Ridge of ``"whitening"``, relative to the mean eigenvalue of a Gram matrix.
        normalization_factors: ``"both"`` or ``"A"``: which factors ``"whitening"`` whitens.
        normalization_iterations: Iterations of ``"sinkhorn"``.
        normalization_temperature: Temperature of ``"sinkhorn"``.
        init_weights: True starts exactly at the base model in the way that suits the normalisation;
            ``"zero_head"`` (heads of B start at zero) and ``"zero_gain"`` (gains start at zero) name
            that way; False starts with a random update (for tests).
        adapted_model: What exports and cards tell of the base model; filled in when the adapter is made.
        adapted_modules: The modules that are adapted, by blocks of layers; filled in when the adapter is made, so that
            ``LoraGenerator`` needs no base model.
        plugin: For readers of ``adapter_config.json``: what loading the adapter needs. Always the same text.

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
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters of experts, by name endings."}
    )
    bias: str = field(default="none", metadata={"help": "Only 'none'."})
    tasks: list[str] | dict[str, str | list[str]] = field(
        default_factory=lambda: ["default"], metadata={"help": "Task names, or task name -> description(s)."}
    )
    task_descriptions: dict[str, str | list[str]] | None = field(
        default=None, metadata={"help": "Task name -> description(s)."}
    )
    task_labels: dict[str, Labels] | None = field(
        default=None, metadata={"help": "Of a classifier: task name -> output -> label."}
    )
    own_factors: list[str] | None = field(default=None, metadata={"help": "Tasks with factors of their own."})
    default_task: str | None = field(default=None, metadata={"help": "Task of calls that name none."})
    task_embedding: str | dict[str, str] = field(
        default="learned",
        metadata={"help": "'learned', 'text', 'both', 'examples', 'text+examples', or task name -> one of these."},
    )
    text_encoder: str | Callable[[list[str]], Tensor] | None = field(
        default=None, metadata={"help": "A sentence-transformers model, or a function."}
    )
    text_encoder_revision: str | None = field(default=None, metadata={"help": "Revision of the text encoder."})
    text_embedding_dim: int | None = field(default=None, metadata={"help": "Size of a description's vector."})
    example_dim: int | None = field(default=None, metadata={"help": "Size of a row's vector."})
    example_classes: int | None = field(default=None, metadata={"help": "Number of classes of examples."})
    task_embedding_dim: int = field(default=64, metadata={"help": "Size of a task embedding."})
    hypernetwork_dim: int = field(default=16, metadata={"help": "Hidden size of the trunk."})
    hypernetwork_depth: int = field(default=2, metadata={"help": "Residual blocks of the trunk."})
    conditioning: str = field(
        default="gated", metadata={"help": "How the task embedding enters: 'gated', 'additive' or 'bilinear'."}
    )
    head: str = field(default="factor", metadata={"help": "What one head emits: 'row', 'factor' or 'pair'."})
    normalization: str = field(default="soft_polar", metadata={"help": f"One of {', '.join(NORMALIZATIONS)}."})
    normalization_bound: float | None = field(
        default=None,
        metadata={"help": "Bound on the update's Frobenius norm, in units of the base weight's."},
    )
    normalization_warmup: int | None = field(
        default=None, metadata={"help": "Optimizer steps over which the bound grows to its whole."}
    )
    normalization_ridge: float | None = field(
        default=None, metadata={"help": "Ridge of whitening, relative to the mean eigenvalue."}
    )
    normalization_factors: str | None = field(
        default=None, metadata={"help": "Which factors whitening whitens: 'both' or 'A'."}
    )
    normalization_iterations: int | None = field(default=None, metadata={"help": "Iterations of sinkhorn."})
    normalization_temperature: float | None = field(default=None, metadata={"help": "Temperature of sinkhorn."})
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True, 'zero_head' or 'zero_gain' (start at the base model) or False."},
    )

    adapted_model: dict[str, Any] | None = field(default=None, metadata={"help": "Filled in: the base model."})
    adapted_modules: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Filled in: the modules that are adapted."}
    )

    # Not a field, so that it is never saved; set where a file is told from a call.
    is_from_file = False
    plugin: str = field(default=PLUGIN, metadata={"help": "What loading the adapter needs."})

    def __post_init__(self) -> None:
        check_type("task_type", self.task_type, str, "the name of a task type")
        check_type("peft_version", self.peft_version, str, "a string")
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = HyperAdapterType.HYPERADAPTER
        self._check_saved()
        self._check_hypernetwork()
        self._check_modules()
        self._check_normalization()
        self._check_tasks()

    def replaced(self, **changes: Any) -> HyperAdapterConfig:
        """A copy with other fields, of which those of tasks are checked; this one stays, since others may hold it."""
        config = copy.copy(self)
        for name, value in changes.items():
            setattr(config, name, value)
        config.is_from_file = self.is_from_file and "text_encoder" not in changes
        config._check_tasks()
        return config

    def with_bound(self, positions: int) -> HyperAdapterConfig:
        """A copy whose bound, if it was left open, is the default one of so many positions."""
        is_open = "bound" in self.normalization_options and self.normalization_bound is None
        return self.replaced(normalization_bound=default_bound(positions)) if is_open else self

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved: a function as text encoder by its name."""
        return {**super().to_dict(), "text_encoder": encoder_name(self.text_encoder)}

    @property
    def task_sources(self) -> list[str]:
        """Where each task's embedding comes from, by task id."""
        sources = self.task_embedding
        return [sources if isinstance(sources, str) else sources[name] for name in self.tasks]

    @property
    def own_task_ids(self) -> list[int]:
        """The ids of the tasks that have factors of their own."""
        places = {name: place for place, name in enumerate(self.tasks)}
        return [places[name] for name in self.own_factors or ()]

    @property
    def has_examples(self) -> bool:
        """Whether the embedding of some task comes from examples."""
        return any(source in EXAMPLES for source in self.task_sources)

    @property
    def embedded_descriptions(self) -> list[list[str]]:
        """The descriptions that take part in each task's embedding, by task id; empty for one without text."""
        return [
            descriptions_of(self.task_descriptions, name) if source in TEXT else []
            for name, source in zip(self.tasks, self.task_sources, strict=True)
        ]

    @property
    def task_names(self) -> list[str]:
        """The task names; a task's id is its place here."""
        return list(self.tasks)

    @property
    def fallback_task(self) -> str:
        """Task of calls that name none: the default task, or else the first."""
        return self.default_task or self.task_names[0]

    def labels_of(self, task: str) -> dict[int, str]:
        """Output of the classifier -> label, of a task; empty if it has none."""
        return by_output((self.task_labels or {}).get(task))

    def output_names(self, task: str | None = None) -> dict[int, str]:
        """A name for each output of the classifier, a task's own first; known of an adapter that was made."""
        return all_names(self.base_facts, self.task_labels or {}, task)

    @property
    def base_facts(self) -> AdaptedModel:
        """What exports and cards tell of the base model; known of an adapter that was made."""
        assert self.adapted_model is not None
        return AdaptedModel.checked("adapted_model", self.adapted_model)

    @property
    def adapted_layers(self) -> list[AdaptedLayers]:
        """The adapted modules, block by block; known of an adapter that was made."""
        return checked_adapted_layers(self.adapted_modules)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Rank r, and the dimensionless factor ``lora_alpha / r``, at a module with this path in the base model."""
        r = value_at("rank_pattern", self.rank_pattern, name, self.r)
        alpha = value_at("alpha_pattern", self.alpha_pattern, name, self.lora_alpha)
        return r, alpha / r

    @property
    def has_gain(self) -> bool:
        """Whether a learned gain per position follows the normalisation."""
        return METHODS[self.normalization].needs_gain(self._given_options())

    @property
    def normalization_options(self) -> dict[str, Any]:
        """The options of the normalisation and its gain, by name without the prefix."""
        given = self._given_options()
        return {name: given[name] for name in METHODS[self.normalization].config_options(given)}

    @property
    def has_zero_heads(self) -> bool:
        """Whether the heads that emit B start at zero."""
        return bool(self.init_weights) and not self.has_gain

    def _check_saved(self) -> None:
        """Check what a file says beside the method's own fields."""
        for name in ("base_model_name_or_path", "revision"):
            check_type(name, getattr(self, name), str, "a string")
        check_type("auto_mapping", self.auto_mapping, dict, "a dict")
        check_type("inference_mode", self.inference_mode, bool, "True or False", optional=False)
        if self.adapted_model is not None:
            AdaptedModel.checked("adapted_model", self.adapted_model)
        if self.adapted_modules is not None:
            checked_adapted_layers(self.adapted_modules)
        check_type("plugin", self.plugin, str, "a string", optional=False)
        self.plugin = PLUGIN

    def _check_hypernetwork(self) -> None:
        for name in ("r", "task_embedding_dim", "hypernetwork_dim"):
            check_integer(name, getattr(self, name))
        check_integer("hypernetwork_depth", self.hypernetwork_depth, MAX_DEPTH)
        check_number("lora_alpha", self.lora_alpha)
        check_number("lora_dropout", self.lora_dropout, "in [0, 1)", lambda value: 0 <= value < 1)
        check_choice("conditioning", self.conditioning, CONDITIONINGS)
        check_choice("head", self.head, HEADS)

    def _check_modules(self) -> None:
        check_pattern("rank_pattern", self.rank_pattern, check_integer)
        check_pattern("alpha_pattern", self.alpha_pattern, check_number)
        check_bias(self.bias)
        self.target_parameters = checked_parameters(self.target_parameters, self.lora_dropout)
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, checked_modules(name, getattr(self, name)))
        self.modules_to_save = checked_modules_to_save(self.modules_to_save)
        self.layers_to_transform = checked_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)

    def _check_normalization(self) -> None:
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        for option, value in checked_options(self.normalization, self._given_options()).items():
            setattr(self, f"normalization_{option}", value)
        check_start(self.init_weights, self.has_gain, self.normalization, self._given_options())

    def _check_tasks(self) -> None:
        if isinstance(self.text_encoder, os.PathLike):
            self.text_encoder = os.fspath(self.text_encoder)
        self.tasks, self.task_descriptions = checked_tasks(self.tasks, self.task_descriptions, self.default_task)
        self.own_factors = checked_own_factors(self.own_factors, self.tasks)
        self.task_embedding = checked_sources(self.task_embedding, self.tasks, self.task_descriptions)
        has_text = any(source in TEXT for source in self.task_sources)
        check_text_fields(has_text, self.text_encoder, self.text_encoder_revision, self.text_embedding_dim)
        check_compared_sizes(self.conditioning, self.text_embedding_dim, self.task_embedding_dim)
        self.task_labels = checked_task_labels(self.task_labels, self.tasks, self.task_type)
        if self.task_labels and self.adapted_model is not None:
            self.task_labels = of_outputs(self.task_labels, self.base_facts)
        check_example_fields(self.has_examples, self.task_type, self.example_dim, self.example_classes)

    def _given_options(self) -> dict[str, Any]:
        """Every option of any normalisation, by name without the prefix; None if not given."""
        return {option: getattr(self, f"normalization_{option}") for option in OPTIONS}
