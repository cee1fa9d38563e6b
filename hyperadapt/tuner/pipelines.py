"""transformers' pipeline for text classification, which answers with the labels of a task."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import TextClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hyperadapt.config.checks import shown
from hyperadapt.tuner.layer import HyperAdapterLayer
from hyperadapt.tuner.model import HyperAdapterModel

_NAME = "text-classification"


class TaskClassificationPipeline(TextClassificationPipeline):
    """As transformers' own; with a hyperadapter whose task has labels, only those compete, under their names.

    ``tasks=`` of a call, or of the pipeline, is the name of one task; without it that of ``use_tasks``, the pinned task
    or the default task answers.
    """

    def _sanitize_parameters(self, tasks: str | None = None, **parameters: Any) -> Any:  # type: ignore[override]
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)  # type: ignore[no-untyped-call]
        if tasks is not None:
            if not isinstance(tasks, str):
                raise TypeError(
                    f"tasks={shown(tasks)} must be the name of one task, not {type(tasks).__name__}: a pipeline splits "
                    "the texts that it is given. Call it once for the texts of each task."
                )
            if _tuner_in(self.model) is None:
                raise ValueError(
                    f"tasks={shown(tasks)} is for a model with a hyperadapter, and {type(self.model).__name__} has "
                    "none. Leave it out."
                )
            forward, postprocess = {**forward, "tasks": tasks}, {**postprocess, "tasks": tasks}
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: Any, tasks: str | None = None) -> Any:  # type: ignore[override]
        if tasks is not None:
            model_inputs["tasks"] = tasks
        return super()._forward(model_inputs)  # type: ignore[no-untyped-call]

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, *args: Any, tasks: str | None = None, **parameters: Any
    ) -> Any:
        """The answers, of a task's own outputs alone."""
        score: Any = TextClassificationPipeline.postprocess
        labels = _labels_in_force(self.model, tasks)
        if not labels:
            return score(self, model_outputs, *args, **parameters)
        config = self.model.config
        names = SimpleNamespace(
            id2label=dict(enumerate(labels.values())), num_labels=config.num_labels, problem_type=config.problem_type
        )
        # transformers' own way of scoring, of a classifier that has no other outputs.
        alone: Any = copy.copy(self)
        alone.model = SimpleNamespace(config=names)
        outputs = {"logits": model_outputs["logits"][..., list(labels)]}
        return score(alone, outputs, *args, **parameters)


def register() -> None:
    """Have ``pipeline("text-classification")`` make the pipeline above; without a hyperadapter it does as before."""
    PIPELINE_REGISTRY.supported_tasks[_NAME]["impl"] = TaskClassificationPipeline


def _tuner_in(model: nn.Module) -> HyperAdapterModel | None:
    return next((module for module in model.modules() if isinstance(module, HyperAdapterModel)), None)


def _labels_in_force(model: nn.Module, tasks: str | None) -> dict[int, str]:
    """Output -> label, of the task that a call used; empty where it has no labels, or no name."""
    tuner = _tuner_in(model)
    if tuner is None or len(tuner.active_adapters) != 1:
        return {}
    name, network = tuner.router.only(tuner.active_adapters)
    if next(module.disable_adapters for module in tuner.modules() if isinstance(module, HyperAdapterLayer)):
        # The base model answers, with its own classifier.
        return {}
    scope = tuner.router.asked
    if tasks is None and scope is not None and scope.request.tasks is None:
        # An embedding is no task, and has no labels.
        return {}
    return network.config.labels_of(tasks or tuner.router.task_in_force(name))
