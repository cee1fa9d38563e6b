"""The tuner model: wraps the base model's modules, owns the networks, and opens every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.routing.checkpointing import factors_carried
from hyperadapt.routing.forward_pass import call_of, check_spelling, main_input
from hyperadapt.routing.requests import Request, Tasks
from hyperadapt.tuner.base_norms import base_norm, is_made_empty
from hyperadapt.tuner.building import built_network, check_in_use, router_of, take_out
from hyperadapt.tuner.labelled_tuner import LabelledTuner
from hyperadapt.tuner.layer import HyperAdapterLayer, layers_in, names_in
from hyperadapt.tuner.layer_types import choose_all_linear, wrapped
from hyperadapt.tuner.loading import weights_follow
from hyperadapt.tuner.lora_only import LORA_ONLY
from hyperadapt.tuner.merging import MergingTuner, check_pin, check_removal
from hyperadapt.tuner.model_state import unchanged_on_error
from hyperadapt.tuner.new_tasks import ExampleReader, NewTask
from hyperadapt.tuner.saved_tuner import SavedTuner
from hyperadapt.tuner.targeted_parameters import ParameterTuner
from hyperadapt.tuner.task_tuner import TaskTuner

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hyperadapt.tasks.fitting import Examples


class HyperAdapterModel(SavedTuner, ParameterTuner, LabelledTuner, MergingTuner, TaskTuner):
    """PEFT tuner for hyperadapters; made by ``get_peft_model`` with a ``HyperAdapterConfig``.

    What it offers on tasks is for the active adapter. An optimizer has to be made anew after tasks have changed.
    """

    tuner_layer_cls = HyperAdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    uses_shared_state = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(model) as before:
            super().__init__(model, *args, **kwargs)
        # Else it would be looked up in the base model, which may be adapted anew after unload().
        self.peft_config = self.model.peft_config
        if weights_follow():
            self.before_loading = before

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the target modules and build the adapter's network; on any error the model is left as it was."""
        with unchanged_on_error(self):
            take_out(model, self.router, adapter_name)
            others = {parameter: parameter.requires_grad for parameter in self.hyperadapter_networks.parameters()}
            self._base_norms: dict[str, Tensor] = {}
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                layers = [one for one in layers_in(model) if adapter_name in one.hyperadapter_position]
                network = built_network(model, self.peft_config[adapter_name], adapter_name, layers, self._base_norms)
            # Trainability follows PEFT: the active adapters train, unless loaded for inference.
            is_active = adapter_name in self.active_adapters
            network.requires_grad_(is_active and not network.config.inference_mode)
            self.hyperadapter_networks[adapter_name] = network
            # There may be modules now that were not looked at.
            self.router.layouts.clear()
            # Not written into the caller's configuration, which may serve for another model.
            self.peft_config[adapter_name] = network.config
            for parameter, requires_grad in others.items():
                parameter.requires_grad_(requires_grad)
            if is_active:
                # PEFT would let those of an earlier model of this base model train on.
                inactive = [name for name in self.hyperadapter_networks if name not in self.active_adapters]
                self.set_requires_grad(inactive, requires_grad=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its network."""
        super().delete_adapter(adapter_name)
        self.router.forget(adapter_name)

    @property
    def tasks(self) -> list[str]:
        """The names of the active adapter's tasks, in the order of their ids."""
        return self.router.only(self.active_adapters)[1].config.task_names

    @property
    def active_task(self) -> str:
        """The task of calls that name none: the merged one, that of ``use_tasks``, the pinned or the default task."""
        name, network = self.router.only(self.active_adapters)
        return self.router.told_task(name) or network.config.fallback_task

    def extra_repr(self) -> str:
        """The tasks of each adapter, and which one is pinned."""
        return "\n".join(map(self.router.described, self.hyperadapter_networks))

    def set_task(self, task: str | None) -> None:  # noqa: DOC502
        """Pin a task: calls that name no task use it, until changed.

        The factors of the eight tasks used last are kept while no parameter changes, gradients are off and no parameter
        of the adapter asks for them, as ``from_pretrained`` loads it; going back to a task then costs nothing. A write
        through ``parameter.data`` of such an adapter goes unnoticed; unpin with None after it, which drops what is
        kept.

        Adapters that were not pinned themselves use their task of that name, too; without one, they are refused where a
        call names none.

        Args:
            task: Name of a task of every active adapter; None goes back to the default task.

        Raises:
            TypeError: If `task` is not a name.
            ValueError: If the task is unknown, or another one is merged.
        """
        check_pin(self.router, self.active_adapters, task)
        for name in self.active_adapters:
            self.router.pin(name, task)

    def add_task(  # noqa: DOC502
        self,
        name: str,
        *,
        description: str | Sequence[str] | None = None,
        examples: Examples | None = None,
        embedding: Tensor | None = None,
        text_encoder: str | Callable[[list[str]], Tensor] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        training_arguments: TrainingArguments | None = None,
        fit: bool = False,
    ) -> None:
        """Add a task after training; nothing else changes.

        Args:
            name: Its name.
            description: A text that describes it, or several. Alone it is the task's condition, as in training, and
                there is no gradient step; with examples it counts as in ``embed_examples``, or is one of the starting
                points of a fit; with an embedding it is only kept.
            examples: Rows of model inputs with labels, a `datasets.Dataset` or a list of dicts. An adapter that was
                trained with examples reads up to 32 in one forward pass. For any other an embedding is fitted to them
                (see ``fit_task_embedding``): 8 to 64 are enough.
            embedding: Its embedding, shape ``(task_embedding_dim,)``; only the direction counts.
            text_encoder: The encoder that the adapter was made with, where its name does not find it (a function, or
                a folder that has moved).
            data_collator: Makes batches of examples, as in ``Trainer``; None stacks them.
            training_arguments: How to fit, as in ``Trainer``; nothing is saved, so it may be what a training had.
                None for a short run that suits few examples.
            fit: Whether to fit the embedding also where examples can be read: it starts at what they give.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the name is taken or empty, nothing or too much is given, the adapter knows no text, the
                encoder is another one, the embedding or the examples are wrong, or the arguments need a whole model to
                train.
        """
        new = NewTask(name, description, examples, embedding, text_encoder, training_arguments, fit)
        reader = self._reader(data_collator)
        new.check(reader.table)
        self._set_table(reader.table.appended(new.row(reader, self, self._call_with_embedding)))

    def remove_task(self, name: str) -> None:  # noqa: DOC502
        """Remove a task; the ids of those after it become smaller by one.

        It warns if that was the last task with descriptions or with examples: then what reads these goes with it.

        Args:
            name: Its name.

        Raises:
            ValueError: If it is unknown, the only one, the default task, pinned or merged.
        """
        adapter_name, _ = self.router.only(self.active_adapters)
        check_removal(self.router, adapter_name, name)
        self._set_table(self._table().without(name))

    def rename_task(self, name: str, new_name: str) -> None:  # noqa: DOC502
        """Rename a task; its id stays.

        Args:
            name: Its name.
            new_name: Its new name.

        Raises:
            TypeError: If the new name is no string.
            ValueError: If it is unknown, or the new name is empty or taken.
        """
        adapter_name, _ = self.router.only(self.active_adapters)
        table = self._table().renamed(name, new_name)
        self.router.rename(adapter_name, name, new_name)
        self._set_table(table)

    def interpolate_tasks(self, name: str, weights: Mapping[str, float]) -> None:  # noqa: DOC502
        """Add a task between others: its embedding is the weighted sum of their embeddings' directions.

        Args:
            name: Name of the new task.
            weights: Known task -> weight (dimensionless); only their ratios count.

        Raises:
            TypeError: If a weight is no number.
            ValueError: If the name is taken, there are no weights, a task is unknown, or the sum is zero.
        """
        table = self._table()
        self._set_table(table.appended(table.row_between(name, weights)))

    def embed_description(  # noqa: DOC502
        self, description: str | Sequence[str], *, text_encoder: str | Callable[[list[str]], Tensor] | None = None
    ) -> Tensor:
        """The task embedding of a description, without a task of that kind: for ``task_embeddings=``.

        Args:
            description: A text, or several that each describe the task.
            text_encoder: As in ``add_task``.

        Returns:
            Shape ``(task_embedding_dim,)``, detached.

        Raises:
            ValueError: If the adapter knows no text, the text is empty, or the encoder is another one.
        """
        return self._table().embed(description, text_encoder)

    def set_examples(  # noqa: DOC502
        self, examples: Mapping[str, Examples], *, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> None:
        """Give tasks the examples that their embeddings come from, before they are trained.

        The base model reads them once. Training draws up to 32 of a task's rows each time, so give more, 128 say; else
        32 count, which are saved with the adapter. ``HyperAdapterTrainer`` does this by itself with training rows.

        Args:
            examples: Name of each task with examples -> rows of model inputs with labels, a `datasets.Dataset` or a
                list of dicts: with one class each; or pairs of prompt and completion, with labels of -100 in the
                prompt. Tasks that have some already may be left out.
            data_collator: Makes batches of rows, as in ``Trainer``; None stacks them.

        Raises:
            TypeError: If `examples` is no dict of rows.
            ValueError: If a task is unknown or left out, has no rows or one class alone, labels are missing or unknown,
                the base model does not take a column, or a task is merged.
        """
        self._reader(data_collator).give(examples)
        self.router.drop_factors(self.router.only(self.active_adapters)[0])

    def embed_examples(  # noqa: DOC502
        self,
        examples: Examples,
        *,
        description: str | Sequence[str] | None = None,
        text_encoder: str | Callable[[list[str]], Tensor] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> Tensor:
        """The task embedding that examples give in one forward pass: for ``task_embeddings=``.

        Args:
            examples: As in ``add_task``, 32 at most.
            description: A text, or several, whose embedding is added; it has no effect on an adapter without text.
            text_encoder: As in ``add_task``.
            data_collator: As in ``add_task``.

        Returns:
            Shape ``(task_embedding_dim,)``, detached.

        Raises:
            TypeError: If `examples` are no rows.
            ValueError: As in ``set_examples``; or if there are too many rows, or the adapter was trained without any.
        """
        return self._reader(data_collator).embed(examples, description, text_encoder, "examples")

    def _reader(self, data_collator: Callable[[list[Any]], Any] | None) -> ExampleReader:
        return ExampleReader(self.model, self.router, self._table(), data_collator)

    def __getattr__(self, name: str) -> Any:
        # PEFT looks names up in the base model, so that the error would tell of that one.
        if name in LORA_ONLY:
            raise AttributeError(LORA_ONLY[name])
        return super().__getattr__(name)

    def _call_with_embedding(self, embedding: Tensor, batch: Mapping[str, Any]) -> Any:
        with self._enable_peft_forward_hooks(task_embeddings=embedding, **batch):
            return self.model(**batch)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.router = router_of(model, self._observe)
        self.hyperadapter_networks = self.router.networks
        # Another model made from this base model may have disabled them.
        self._enable_adapter_layers()

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, HyperAdapterConfig)
        choose_all_linear(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, HyperAdapterConfig)
        if isinstance(target, HyperAdapterLayer):
            layer = target
        else:
            layer = wrapped(target, parent, current_key, self.model, self.router)
        r, scaling = peft_config.rank_and_scaling(current_key)
        position = layer.position_at(current_key, r, scaling)
        # Read here, so that an unusable weight is refused before PEFT goes on to wrap modules_to_save. Parameters that
        # come from a file bring the norms along.
        if not is_made_empty():
            self._base_norms[current_key] = base_norm(layer, position)
        layer.update_layer(adapter_name, position, peft_config.lora_dropout)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies a `weight`, which a quantised layer need not have, to where it already is.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        network = self.router.network(adapter_name)
        if autocast_adapter_dtype and next(network.parameters()).element_size() < 4:
            network.float()

    @contextmanager
    def _enable_peft_forward_hooks(
        self,
        *args: Any,
        tasks: Tasks | None = None,
        task_embeddings: Tensor | None = None,
        task_rows: Mapping[str, Sequence[int] | Tensor] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names={adapter_names!r} is not supported by hyperadapters: one adapter serves many tasks. "
                "Name the task of each row with tasks= instead."
            )
        check_in_use(self.model, self.router)
        check_spelling(self.model, kwargs)
        _, model_input = main_input(self.model, args, kwargs)
        request = Request(tasks, task_embeddings, task_rows)
        options = {"default_generation_config": getattr(self.model, "generation_config", None), **kwargs}
        with ExitStack() as stack:
            stack.enter_context(self.router.open(request, self.active_adapters, model_input, options))
            stack.enter_context(factors_carried(self.model, self.router, names_in))
            yield

    def _observe(self, path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = call_of(path, part, args, kwargs, self.model)
        if call is not None:
            self.router.observe(part, call)
