"""The module of a SentenceTransformer that has a hyperadapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from sentence_transformers.base.modules import Transformer
from torch import Tensor

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.sentence_transformers.encoding import TaskText, adopt
from hyperadapt.sentence_transformers.tasks_in_force import AUTOMATIC, pinned_task, task_names_of
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.trainer.batches import TASK_COLUMN
from hyperadapt.tuner.active import active_network, find_tuner

# What loads the adapter, and not its base model.
_OF_ADAPTER = ("revision", "subfolder")
_OF_HUB = (*_OF_ADAPTER, "token", "cache_dir", "local_files_only")


class HyperAdapterTransformer(Transformer):
    """The ``Transformer`` module of a ``SentenceTransformer`` whose model has a hyperadapter.

    It writes the tasks of a batch into its features, as `tasks`: a name, or int64 ids ``(batch,)``. Without them the
    task is that of ``use_tasks`` or ``set_task``, or the only one; one of several is never guessed.

    Args:
        model_name_or_path: Folder or repository of a saved model.
        **kwargs: As of ``Transformer``.

    Raises:
        ValueError: If it holds no hyperadapter, or the backend is not torch.
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:  # noqa: DOC502
        super().__init__(model_name_or_path, **kwargs)
        hub = {name: value for name, value in (kwargs.get("model_kwargs") or {}).items() if name in _OF_HUB}
        # What is loaded may be trained further, as any SentenceTransformer.
        self.adapt(PeftModel.from_pretrained(self.model, model_name_or_path, is_trainable=True, **hub))

    def adapt(self, model: Any) -> None:
        """Use the model with the hyperadapter in place of the base model, whose inputs are known by now."""
        self.model = model
        self.forward_kwargs = {TASK_COLUMN}
        if self.model_forward_params is not None:
            self.model_forward_params = self.model_forward_params | {TASK_COLUMN}

    def on_model_ready(self, model: Any) -> None:
        """Let the whole model take tasks."""
        adopt(model)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        task: str | None = None,
        tasks: str | Sequence[str] | Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tokenise texts, each with its task, if it has one; `task` is what sentence-transformers calls one for all."""
        if not inputs:
            return {}
        if not isinstance(task, str):
            # A trainer's model card gives columns that are called as a data set that data set's router mapping.
            task = None
        names = task_names_of(self)
        if tasks is None and isinstance(inputs[0], TaskText):
            tasks = [text.task for text in inputs]
            inputs = [str(text) for text in inputs]
        if tasks is None and task is not None and (task in names or task not in AUTOMATIC):
            tasks = task
        features: dict[str, Any] = super().preprocess(inputs, prompt, processing_kwargs, task=task, **kwargs)
        if tasks is not None:
            features[TASK_COLUMN] = _checked(tasks, names, len(inputs))
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the model with the tasks in the features, or the one in force."""
        if kwargs.get(TASK_COLUMN, features.get(TASK_COLUMN)) is None:
            self._check_task_in_force()
        result: dict[str, Any] = super().forward(features, **kwargs)
        return result

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the module's files, of whose adapters the one called "default" is loaded again."""
        name, _ = active_network(self)
        if name != "default":
            raise ValueError(
                f"The active adapter is {name!r}, but a saved model is loaded with the one called 'default'. Call "
                "set_adapter('default') of model.transformers_model, write its adapters with its save_pretrained, or "
                "export a task with export_sentence_transformer."
            )
        super().save(output_path, *args, **kwargs)

    def _check_task_in_force(self) -> None:
        names = task_names_of(self)
        if len(names) > 1 and find_tuner(self).router.asked is None and pinned_task(self) is None:
            raise ValueError(
                f"The model has the tasks {shown(names)}, but a batch does not say which of them it is for. Call "
                "encode with tasks=, or forward with features from preprocess(texts, tasks=...). In training, use "
                "MultiTaskSentenceTransformerTrainer, or name the task of each column with router_mapping."
            )

    def _should_flatten_inputs(self, modality: Any, processor_inputs: Any, **kwargs: Any) -> bool:
        # Texts in one long row could not be told apart; whether they have one task is not known here.
        return False

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> Any:
        """The base model of the folder's hyperadapter."""
        if not is_peft_model:
            raise ValueError(
                f"{model_name_or_path!r} has no adapter_config.json, so that there is no hyperadapter to load. Load "
                "its modules with SentenceTransformer, and call add_hyperadapter(model, HyperAdapterConfig(...))."
            )
        hub = {name: value for name, value in model_kwargs.items() if name in _OF_HUB}
        adapter = PeftConfig.from_pretrained(model_name_or_path, **hub)
        if not isinstance(adapter, HyperAdapterConfig):
            raise ValueError(
                f"{model_name_or_path!r} holds an adapter of type {adapter.peft_type}, not a hyperadapter. In its "
                "modules.json, name the class of the module sentence_transformers.base.modules.Transformer."
            )
        base: Any = adapter.base_model_name_or_path
        of_base = {name: value for name, value in model_kwargs.items() if name not in _OF_ADAPTER}
        return super()._load_model(base, transformer_task, config, backend, False, **of_base)


# Folders name the class by this path.
HyperAdapterTransformer.__module__ = "hyperadapt.sentence_transformers"


def _checked(tasks: str | Sequence[str] | Tensor, names: Sequence[str], num_rows: int) -> str | Tensor:
    """Tasks as features: one name, or an id for each of some rows."""
    ids = resolve_task_ids(tasks, names)
    if isinstance(tasks, str):
        return tasks
    if len(ids) != num_rows:
        raise ValueError(
            f"Got tasks for {len(ids)} texts, but there are {num_rows}. Pass one task per text, or one name for all."
        )
    return ids.to(torch.int64)
