"""Reward functions of their own for each task, for trainers that generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperadapt.config.checks import shown
from hyperadapt.trainer.batches import TASK_COLUMN

RewardFunction = Callable[..., Any]


def reward_functions(
    by_task: Mapping[str, RewardFunction | Sequence[RewardFunction]], tasks: Sequence[str], trained: Sequence[str]
) -> list[RewardFunction]:
    """Functions for all rows of a batch, called ``<task>/<name>``, that give None to rows of other tasks.

    `tasks` are all names of the adapter, in the order of their ids, and `trained` those that there are rows of.
    """
    for task in by_task:
        if task not in tasks:
            raise ValueError(f"reward_funcs has the unknown task {task!r}. Known tasks: {shown(list(tasks))}.")
    lacking = [task for task in trained if not by_task.get(task)]
    if lacking:
        raise ValueError(f"reward_funcs has no function for {shown(lacking)}, of which there are rows. Give one.")
    functions = []
    for task, given in by_task.items():
        for function in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            if not callable(function) or hasattr(function, "forward"):
                raise TypeError(
                    f"reward_funcs[{task!r}] holds {shown(function)}, but must be a function, or a list of functions. "
                    "A reward model scores the rows of all tasks: give it in a list, in place of the dict."
                )
            functions.append(_of_task(function, task, tasks))
    return functions


def _of_task(function: RewardFunction, task: str, tasks: Sequence[str]) -> RewardFunction:
    task_id = list(tasks).index(task)
    name = f"{task}/{getattr(function, '__name__', type(function).__name__)}"

    def chosen(columns: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        ids = columns[TASK_COLUMN]
        rows = [row for row, one in enumerate(ids) if one == task_id]
        own = {
            column: [values[row] for row in rows] if isinstance(values, list) and len(values) == len(ids) else values
            for column, values in columns.items()
        }
        if "log_extra" in columns:
            own["log_extra"] = lambda column, values: columns["log_extra"](column, _spread(values, rows, len(ids)))
        return rows, own

    def checked(rewards: Sequence[Any], rows: Sequence[int], count: int) -> list[Any]:
        if len(rewards) != len(rows):
            raise ValueError(
                f"The reward function {name!r} gave {len(rewards)} rewards for {len(rows)} completions. Give one for "
                "each."
            )
        return _spread(rewards, rows, count)

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def later(**columns: Any) -> list[Any]:
            rows, own = chosen(columns)
            return checked(await function(**own) if rows else [], rows, len(columns[TASK_COLUMN]))

        return _called(later, name)

    def reward(**columns: Any) -> list[Any]:
        rows, own = chosen(columns)
        return checked(function(**own) if rows else [], rows, len(columns[TASK_COLUMN]))

    return _called(reward, name)


def _called(function: RewardFunction, name: str) -> RewardFunction:
    function.__name__ = name
    return function


def _spread(values: Sequence[Any], rows: Sequence[int], count: int) -> list[Any]:
    """Values of some rows, and None for the others."""
    by_row = dict(zip(rows, values, strict=True))
    return [by_row.get(row) for row in range(count)]
