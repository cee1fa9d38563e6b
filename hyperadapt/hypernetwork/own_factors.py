"""Factors of a task's own, which are added to those that the hypernetwork generates for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hyperadapt.hypernetwork.hypernetwork import Generated, shape_name
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.tables import Tables
from hyperadapt.tasks.ids import can_read
from hyperadapt.tasks.table import TaskFactors


class OwnFactors(nn.ModuleList):
    """Those of some tasks, by id: for each shape of positions an A and a B, ``(weights, r, size)``, as in a LoRA.

    Other tasks keep every bit. A task is an entry of its own, so that no optimizer touches one by training another.
    """

    def __init__(
        self, positions: Sequence[Position], task_ids: Sequence[int], factors: Iterable[TaskFactors] | None = None
    ) -> None:
        super().__init__((zero_factors(positions) for _ in task_ids) if factors is None else factors)
        self.task_ids = tuple(task_ids)
        self._places = _places(positions)
        self._tables = Tables()

    def added_to(self, generated: Sequence[Generated], ids: Tensor) -> list[Generated]:
        """What was generated for task ids ``(tasks,)``, which may be written to, with the tasks' own factors."""
        groups = list(generated)
        if not self.task_ids:
            return groups
        if not torch.is_grad_enabled() and can_read(ids):
            # Of all that there are, only those of the batch, each once.
            for row, task_id in enumerate(ids.tolist()):
                if task_id in self.task_ids:
                    for group in groups:
                        own_A, own_B = self._of(self.task_ids.index(task_id), group)
                        group.lora_A[row].add_(own_A)
                        group.lora_B.mT[row].add_(own_B)
            return groups
        # With gradients all of them take part, those of no row with a gradient of zero, as DDP asks.
        for place, task_id in enumerate(self.task_ids):
            is_own = (ids == task_id)[:, None, None, None]
            for index, group in enumerate(groups):
                device = group.lora_A.device
                lora_A, rows_B = (
                    torch.where(is_own.to(device, non_blocking=True), factor + own, factor)
                    for factor, own in zip((group.lora_A, group.lora_B.mT), self._of(place, group), strict=True)
                )
                groups[index] = group._replace(lora_A=lora_A, lora_B=rows_B.mT)
        return groups

    def of(self, place: int) -> TaskFactors:
        """Those of the task with this place among the ids."""
        one = self[place]
        assert isinstance(one, TaskFactors)
        return one

    def _of(self, place: int, group: Generated) -> list[Tensor]:
        """A and B of one task for a group, which may lack some of the positions of its shape."""
        weights = [weight for position in group.positions for weight in self._places[position.name]]
        found = []
        for factor in "AB":
            own: Tensor = self.of(place)[f"{factor}_{shape_name(group.positions[0])}"]
            is_whole = weights == list(range(len(own)))
            found.append(own if is_whole else own[self._tables.table(weights, own.device)])
        return found


def zero_factors(positions: Sequence[Position]) -> TaskFactors:
    """The own factors of one task before it is trained: it is what is generated for it."""
    counts: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for position in positions:
        for factor, size in (("A", position.in_features), ("B", position.out_features)):
            key = f"{factor}_{shape_name(position)}"
            counts[key] = counts.get(key, 0) + position.weights
            sizes[key] = position.r, size
    return TaskFactors({key: nn.Parameter(torch.zeros(counts[key], *sizes[key])) for key in counts})


def _places(positions: Sequence[Position]) -> dict[str, range]:
    """For each position the places of its weights among those of its shape."""
    places, ends = {}, dict.fromkeys(map(shape_name, positions), 0)
    for position in positions:
        start = ends[shape_name(position)]
        ends[shape_name(position)] = start + position.weights
        places[position.name] = range(start, start + position.weights)
    return places
