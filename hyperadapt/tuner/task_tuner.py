"""The tasks of a tuner as a table, and factors of a task's own."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner

from hyperadapt.hypernetwork.own_factors import zero_factors
from hyperadapt.routing.router import Router
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tasks.table import TaskTable
from hyperadapt.tuner.new_tasks import table_of


class TaskTuner(BaseTuner):
    """A tuner whose tasks change, and may have factors of their own."""

    router: Router

    # Tensors of inference mode could not be trained.
    @torch.inference_mode(False)
    def add_own_factors(self, task: str) -> None:  # noqa: DOC502
        """Give a task factors of its own, as many numbers as a LoRA; they are saved, merged and exported with the task.

        They are added to the generated ones, and both are normalised together. They start at zero: nothing changes
        until they are trained, alone (see ``set_trained_task``) or with the rest of the adapter.

        Args:
            task: Name of the task.

        Raises:
            ValueError: If it is unknown, or has some already.
        """
        _, network = self.router.only(self.active_adapters)
        like = network.hypernetwork.layer_embedding
        factors = zero_factors(network.positions).to(like).requires_grad_(like.requires_grad)
        self._set_table(self._table().with_own_factors(task, factors))

    def set_trained_task(self, task: str | None) -> None:  # noqa: DOC503
        """Let only the own factors of a task train from now on; make the optimizer after this.

        All that tasks share is frozen, modules of ``modules_to_save`` too, so every other task keeps every bit. That
        holds until None lets all of the adapter train again; ``set_requires_grad`` does as it is told.

        Args:
            task: Name of the task, or None.

        Raises:
            ValueError: If it is unknown, or has no factors of its own.
        """
        name, network = self.router.only(self.active_adapters)
        own = network.table.own_factors
        if task is not None:
            resolve_task_ids(task, network.config.task_names)
            if task not in own:
                raise ValueError(
                    f"Task {task!r} has no factors of its own that could train alone. Give it some with "
                    f"add_own_factors({task!r})."
                )
        for one, factors in own.items():
            factors.trains_alone = one == task
        self.set_requires_grad(name)
        network.requires_grad_(True)
        self._freeze_what_is_shared()

    @property
    def trained_task(self) -> str | None:
        """The task that trains alone, by ``set_trained_task``; None if there is none."""
        own = self.router.only(self.active_adapters)[1].table.own_factors
        return next((task for task, factors in own.items() if factors.trains_alone), None)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as PEFT does; a task that trains alone still does."""
        super().set_adapter(adapter_name, inference_mode)
        if not inference_mode:
            self._freeze_what_is_shared()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        if enabled:
            # PEFT lets all of the adapter train, also where it was only disabled for a while.
            self._freeze_what_is_shared()

    def _freeze_what_is_shared(self) -> None:
        for name in self.active_adapters:
            if name not in self.router.networks:
                continue
            for factors in self.router.network(name).table.own_factors.values():
                if factors.trains_alone:
                    self.set_requires_grad(name, requires_grad=False)
                    factors.requires_grad_(True)

    def _table(self) -> TaskTable:
        return table_of(self.router.only(self.active_adapters)[1])

    def _set_table(self, table: TaskTable) -> None:
        adapter_name, network = self.router.only(self.active_adapters)
        network.take(table)
        self.peft_config[adapter_name] = table.config
        # A new tensor may lie where the old one did, so that nothing tells stale factors.
        self.router.drop_factors(adapter_name)
