"""The labels of a classifier's tasks, on a tuner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.tuners.tuners_utils import BaseTuner

from hyperadapt.config.label_fields import checked_labels
from hyperadapt.routing.router import Router
from hyperadapt.tasks.ids import resolve_task_ids


class LabelledTuner(BaseTuner):
    """A tuner whose tasks may have labels of their own."""

    router: Router

    def set_labels(  # noqa: DOC502
        self, task: str, labels: Sequence[str] | Mapping[int, str] | None
    ) -> None:
        """Name the labels of a task of a classifier: saved with the adapter, and its own outputs alone compete.

        Args:
            task: Name of the task.
            labels: Output of the classifier -> label; or labels that outputs have in the base model's ``id2label``;
                or, where those have no names, one for each output in order. None takes the task's labels away.

        Raises:
            TypeError: If the labels are of another type, or one is no text.
            ValueError: If the task is unknown, a label comes twice or is empty, or the classifier has no such output.
        """
        name, network = self.router.only(self.active_adapters)
        resolve_task_ids(task, network.config.task_names)
        known = dict(network.config.task_labels or {})
        if labels is None:
            known.pop(task, None)
        else:
            known[task] = checked_labels(task, dict(labels) if isinstance(labels, Mapping) else labels)
        network.config = network.config.replaced(task_labels=known or None)
        self.peft_config[name] = network.config
