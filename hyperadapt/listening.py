"""Whether a task's condition matters: the same rows answered under its own condition and under others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from hyperadapt.config.checks import check_type, shown
from hyperadapt.diagnosis import html_of
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tasks.ids import can_read, resolve_task_ids
from hyperadapt.tasks.table import Encoder, TaskTable
from hyperadapt.tuner.active import active_network, use_tasks

BLANK = "-"
UNRELATED = (
    "The kettle has been on the stove for ten minutes.",
    "Granite forms when magma cools slowly below the surface.",
    "The ferry to the island leaves at noon from the north pier.",
)
# Of each control the mean over several is taken, so that no single odd one decides.
MAX_OTHERS = 3
RESAMPLES = 2000
CONTROLS = ("shuffled", "blank", "unrelated")

Rows = TypeVar("Rows")
Metric = Callable[[nn.Module, Rows], Any]


@dataclass(frozen=True)
class Control:
    """What the rows of a task got under one condition; several stand for it, and of those it is the mean.

    Args:
        name: ``"true"``, ``"shuffled"``, ``"blank"``, ``"unrelated"``; or ``"task"``, the task as calls use it, own
            factors included, where `true` is its description alone.
        conditions: What stood for it: names of tasks, or texts.
        mean: Mean of the metric over rows.
        gain: Mean over rows of how much more the true condition gets; 0 for itself.
        interval: Of the gain, 95%: rows are drawn with replacement, the same ones for all conditions.
    """

    name: str
    conditions: tuple[str, ...]
    mean: float
    gain: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Controls:
    """The same rows of one task, under its own condition and under the controls.

    Args:
        task: The task.
        rows: Number of rows.
        arms: The conditions, the true one first.
        without: Control -> why it has no meaning for this task.
    """

    task: str
    rows: int
    arms: tuple[Control, ...]
    without: Mapping[str, str]

    @property
    def is_above(self) -> bool:
        """Whether the true condition is above every control, with intervals above zero."""
        return all(arm.interval[0] > 0 for arm in self.arms if arm.name in CONTROLS)

    def __str__(self) -> str:
        lines = [f"{self.task}, {self.rows} rows", f"{'condition':<12}{'mean':>8}{'true gains':>12}  95% interval"]
        for arm in self.arms:
            gain = "" if arm.name == "true" else f"{arm.gain:>12.3f}  {arm.interval[0]:.3f} to {arm.interval[1]:.3f}"
            lines.append(f"{arm.name:<12}{arm.mean:>8.3f}{gain}")
        lines += [f"{name:<12}none: {reason}" for name, reason in self.without.items()]
        verdict = "is above every control" if self.is_above else "is not above every control"
        return "\n".join([*lines, f"The true condition {verdict}."])

    def _repr_html_(self) -> str:
        rows = [["condition", "mean", "true gains", "95% interval"]]
        for arm in self.arms:
            low, high = arm.interval
            gain = ["", ""] if arm.name == "true" else [f"{arm.gain:.3f}", f"{low:.3f} to {high:.3f}"]
            rows.append([arm.name, f"{arm.mean:.3f}", *gain])
        return html_of(str(self).splitlines(), "condition ", rows)


class Condition(NamedTuple):
    """What stands for a condition: texts or tasks, and an embedding of each, ``(conditions, task_embedding_dim)``."""

    names: tuple[str, ...]
    # None where the tasks are asked for by name, as calls do: an embedding would leave out their own factors.
    embeddings: Tensor | None = None

    @property
    def requests(self) -> Sequence[str | Tensor]:
        """A task's name, or an embedding, for each."""
        return self.names if self.embeddings is None else list(self.embeddings)


def controls(  # noqa: DOC502
    model: nn.Module,
    task: str,
    rows: Rows,
    metric: Metric[Rows],
    *,
    text_encoder: Encoder = None,
    seed: int = 0,
) -> Controls:
    """Answer the same rows of a task under its own condition, and under ones that should do worse.

    Where the task has a description: that alone; up to three other tasks' descriptions (`shuffled`); a dash (`blank`);
    and three sentences about something else (`unrelated`). An adapter that ignores descriptions, or is good at the rows
    whatever it is told, does as well under those. A learned embedding reads no text: only other tasks, as calls use
    them, stand against it. The model answers the rows up to nine times, in evaluation mode and without gradients, and
    is not changed.

    Args:
        model: A model with a hyperadapter, wrapped or not.
        task: Name of the task.
        rows: Labelled rows of the task, in any form that `metric` takes.
        metric: Called with the model and the rows. Returns a number for each row, always in the same order, of which
            more is better: 1 for a right answer and 0 for a wrong one, or the negative loss. It calls the model, or
            ``generate``, without ``tasks=``: the task is in force, as in ``use_tasks``.
        text_encoder: The encoder that the adapter was made with, where its name does not find it (a function, or a
            folder that has moved).
        seed: Seed of the choice of other tasks, and of the intervals.

    Returns:
        The means, and what the true condition gains over each.

    Raises:
        TypeError: If the model has no hyperadapter, or the metric gives no numbers.
        ValueError: If the task is unknown, there is nothing to compare it with, the encoder is another one, or the
            metric does not give a finite number for each row, or names tasks itself.
    """
    check_type("task", task, str, "the name of a task", optional=False)
    neutral = neutral_conditions(model, text_encoder) if has_text(model, task) else {}
    return compare(model, task, rows, metric, neutral, seed)


def has_text(model: nn.Module, task: str) -> bool:
    """Whether a task's condition comes from a description, if only in part."""
    config = active_network(model)[1].config
    return bool(config.embedded_descriptions[int(resolve_task_ids(task, config.task_names))])


def neutral_conditions(model: nn.Module, text_encoder: Encoder) -> dict[str, Condition]:
    """What stands for the blank and the unrelated description, of any task; the encoder is loaded once for all."""
    table = _table(model)
    with torch.no_grad():
        vectors = table.vectors_of([BLANK, *UNRELATED], text_encoder).to(table.embedding.text_vectors.device)
        embeddings = table.embedding.project(vectors)
    return {"blank": Condition((BLANK,), embeddings[:1]), "unrelated": Condition(UNRELATED, embeddings[1:])}


def compare(
    model: nn.Module, task: str, rows: Rows, metric: Metric[Rows], neutral: Mapping[str, Condition], seed: int
) -> Controls:
    """As ``controls``, with the neutral conditions of a task that has a description."""
    generator = np.random.default_rng(seed)
    conditions, without = _conditions(_table(model), task, neutral, generator)
    if not conditions.keys() & set(CONTROLS):
        raise ValueError(f"Task {task!r} has nothing to be compared with: {'; '.join(without.values())}.")
    with _evaluating(model) as network:
        answers = {
            name: [_values(model, network, asked, rows, metric) for asked in condition.requests]
            for name, condition in conditions.items()
        }
    sizes = {len(values) for several in answers.values() for values in several}
    if len(sizes) > 1:
        raise ValueError(f"metric gave {shown(sorted(sizes))} numbers for the same rows. Return one for each row.")
    means = np.stack([np.mean(several, 0) for several in answers.values()])
    gains = means[0] - means
    arms = [
        Control(name, conditions[name].names, float(mean), float(gain), interval)
        for name, mean, gain, interval in zip(
            answers, means.mean(1), gains.mean(1), _intervals(gains, generator), strict=True
        )
    ]
    return Controls(task, sizes.pop(), tuple(arms), without)


def _table(model: nn.Module) -> TaskTable:
    return active_network(model)[1].table


def _conditions(
    table: TaskTable, task: str, neutral: Mapping[str, Condition], generator: np.random.Generator
) -> tuple[dict[str, Condition], dict[str, str]]:
    """Name -> condition, the true one first; and control -> why there is none."""
    names, texts, own = table.config.task_names, table.config.embedded_descriptions, table.config.own_factors or ()
    task_id = int(resolve_task_ids(task, names))
    others = [place for place, text in enumerate(texts) if place != task_id and (text or not texts[task_id])]
    chosen = sorted(generator.permutation(others)[:MAX_OTHERS].tolist())
    without: dict[str, str] = {}
    if texts[task_id]:
        found = {"true": _described(table, [task_id]), "shuffled": _described(table, chosen), **neutral}
        if table.config.task_sources[task_id] != "text" or task in own:
            found["task"] = Condition((task,))
    else:
        found = {"true": Condition((task,)), "shuffled": Condition(tuple(names[place] for place in chosen))}
        without = dict.fromkeys(("blank", "unrelated"), "the task's embedding reads no description")
    if not chosen:
        del found["shuffled"]
        of_kind = " with a description" if texts[task_id] else ""
        without = {"shuffled": f"the adapter has no other task{of_kind}", **without}
    return found, without


@torch.no_grad()
def _described(table: TaskTable, task_ids: Sequence[int]) -> Condition:
    """Tasks by their descriptions alone, without what was learned of them."""
    names = tuple(table.config.task_names[place] for place in task_ids)
    counts = [len(texts) for texts in table.config.embedded_descriptions]
    vectors = torch.split(table.embedding.text_vectors, counts)
    sums = [rms_norm(vectors[place], vectors[place].shape[-1:]).sum(0) for place in task_ids]
    return Condition(names, torch.stack([table.embedding.project(one) for one in sums]) if sums else torch.empty(0))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[HyperAdapterNetwork]:
    """The active network, in evaluation mode and without gradients, as its model is until the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield active_network(model)[1]
    finally:
        for module, training in modes.items():
            module.training = training


def _values(
    model: nn.Module, network: HyperAdapterNetwork, asked: str | Tensor, rows: Rows, metric: Metric[Rows]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The metric of each row under a task or an embedding, checked."""
    in_force = {network.config.task_names.index(asked)} if isinstance(asked, str) else set()

    def refuse_others(_: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0]
        if not given.is_floating_point() and can_read(given) and set(given.tolist()) != in_force:
            raise ValueError(
                "metric names tasks itself, so that all conditions would get the same answers. Have it call the model "
                "without tasks=: the condition is in force already."
            )

    hook = network.register_forward_pre_hook(refuse_others)
    try:
        with use_tasks(model, asked) if isinstance(asked, str) else use_tasks(model, task_embeddings=asked):
            given = metric(model, rows)
    finally:
        hook.remove()
    try:
        values = torch.as_tensor(given).detach().double().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric gave {shown(given)}, but must give a number for each row.") from error
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"metric gave {shown(given)} of shape {values.shape}, but must give a finite number for each row, of at "
            "least 2 rows."
        )
    return values


def _intervals(
    gains: np.ndarray[Any, np.dtype[np.float64]], generator: np.random.Generator
) -> list[tuple[float, float]]:
    """95% intervals of the means of gains ``(conditions, rows)``, by the same draws of rows for all conditions."""
    rows = gains.shape[1]
    draws = [np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(RESAMPLES)]
    means = np.stack([gains @ draw / rows for draw in draws])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
