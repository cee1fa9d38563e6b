"""How different the tasks' generated updates really are: a hypernetwork may ignore what it is told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor, nn

from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.saturation import REMEDY, SATURATED, Saturation
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.hypernetwork.updates import pairwise_inner_products, spectrum
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.active import active_network

# A share of the squared norm: what tells the tasks' updates apart then is below a tenth (√0.01) of the updates' norm.
# With random heads, before any training, the share is above 0.1.
COLLAPSED_SHARE = 0.01
_SHOWN_TASKS = 20
_SHOWN_POSITIONS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """How the updates ΔW of an adapter's tasks differ; all tensors are float64, on the CPU.

    The share that the task explains is ``Σ‖ΔW_t - mean ΔW‖² / Σ‖ΔW_t‖²``, sums over tasks t: 0 where all tasks have the
    same update, 1 - 1/T for T unrelated (orthogonal) updates of equal norm, up to 1 where they cancel. It is NaN
    where all updates are zero, as is the cosine with an update of zero.

    The experts of a fused parameter are one position: its update is that of all of them, one beside the other.

    Args:
        tasks: The tasks' names, length T.
        positions: Names of the adapted modules, length P.
        share: Share of the updates that the task explains, all positions together (dimensionless).
        position_shares: The same at each position, shape ``(P,)``.
        cosines: Cosine of the whole updates between tasks, shape ``(T, T)``.
        norms: ‖ΔW‖_F in units of the base weight's ‖W₀‖_F (dimensionless), shape ``(P, T)``.
        task_norms: The same over all positions, ``√(Σ‖ΔW‖² / Σ‖W₀‖²)``, shape ``(T,)``.
        singular_values: Singular values of ΔW by position, in units of the weights, shape ``(T, r)``, descending; fewer
            than r where the module is smaller. Of experts, place by place, the root of the sum of their squares.
        bound_shares: Share of its bound that each update has reached (dimensionless), shape ``(P, T)``: of the largest
            singular value, the gain or the norm, whichever the normalisation bounds; of experts the mean. None
            if it bounds nothing.
    """

    tasks: tuple[str, ...]
    positions: tuple[str, ...]
    share: float
    position_shares: Tensor
    cosines: Tensor
    norms: Tensor
    task_norms: Tensor
    singular_values: dict[str, Tensor]
    bound_shares: Tensor | None

    @property
    def is_zero(self) -> bool:
        """Whether all updates are zero, as before training."""
        return not self.norms.any()

    @property
    def is_collapsed(self) -> bool:
        """Whether there are several tasks and their updates are (nearly) the same."""
        return len(self.tasks) > 1 and self.share < COLLAPSED_SHARE

    @property
    def saturation(self) -> Saturation | None:
        """Which share of the updates is at its bound, overall and by layer; None without a bound."""
        if self.bound_shares is None:
            return None
        shares = (self.bound_shares >= SATURATED).double().mean(1).tolist()
        return Saturation.of(dict(zip(self.positions, shares, strict=True)))

    def __str__(self) -> str:
        share = f"{self.share:.1%} ({1 - 1 / len(self.tasks):.1%} if unrelated)"
        lines = [
            f"{len(self.tasks)} tasks at {len(self.positions)} positions; share of the updates that the task explains: "
            f"{'none, all are zero' if self.is_zero else share}",
            f"{'task':<24}{'norm / base':>12}{'stable rank':>12}  nearest task (cosine)",
        ]
        for index, (task, norm, rank) in enumerate(self._sizes()):
            lines.append(f"{task:<24}{norm:>12.2e}{rank:>12.1f}  {self.nearest(index)}")
        if len(self.tasks) > _SHOWN_TASKS:
            lines.append(f"and {len(self.tasks) - _SHOWN_TASKS} more tasks")
        if len(self.tasks) > 1 and not self.is_zero:
            lines.append("positions where the task explains least:")
            order = self.position_shares.nan_to_num(torch.inf).argsort()[:_SHOWN_POSITIONS].tolist()
            lines += [f"  {self.positions[index]}: {float(self.position_shares[index]):.1%}" for index in order]
        if self.saturation and not self.is_zero:
            lines.append(f"{self.saturation}{f'. {REMEDY}' if self.saturation.is_high else ''}")
        return "\n".join(line.rstrip() for line in lines)

    # In a notebook or a console, the table and not all of its tensors.
    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [["task", "norm / base", "stable rank", "nearest task (cosine)"]]
        for index, (task, norm, rank) in enumerate(self._sizes()):
            rows.append([task, f"{norm:.2e}", f"{rank:.1f}", self.nearest(index)])
        return html_of(str(self).splitlines(), "task ", rows)

    def _sizes(self) -> list[tuple[str, float, float]]:
        """Of the tasks that are shown, name, norm and stable rank."""
        ranks = torch.stack([_stable_rank(values) for values in self.singular_values.values()]).nanmean(0)
        return list(zip(self.tasks, self.task_norms.tolist(), ranks.tolist(), strict=True))[:_SHOWN_TASKS]

    def nearest(self, index: int) -> str:
        """The task whose update points in the most similar direction.

        Args:
            index: A task's place in `tasks`.

        Returns:
            Its name and the cosine in words; empty if there is no other.
        """
        cosines = self.cosines[index].nan_to_num(-torch.inf)
        cosines[index] = -torch.inf
        other = int(cosines.argmax())
        return f"{self.tasks[other]} ({float(cosines[other]):.2f})" if cosines[other] > -torch.inf else ""


def html_of(lines: Sequence[str], head: str, rows: Sequence[Sequence[str]]) -> str:
    """Lines of text as HTML for notebooks, with a table in place of the line of its `head` and the rows after it."""
    place = next(index for index, line in enumerate(lines) if line.startswith(head))
    cells = [
        "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
        for kind, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    table = f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    before, after = ("<br>".join(map(escape, part)) for part in (lines[:place], lines[place + len(rows) :]))
    return f"<div>{before}{table}{after}</div>"


def diagnose(model: nn.Module, tasks: Sequence[str] | None = None) -> Diagnosis:  # noqa: DOC502
    """Compare the updates that the active adapter generates for its tasks; the model is not changed.

    Warns if they are all zero, or if there are several tasks and all get nearly the same update: a hypernetwork that
    ignores its condition trains like one shared LoRA, which a falling loss does not show. The updates are compared
    through products of the size of the rank, never formed.

    Args:
        model: A ``PeftModel`` with a hyperadapter, in any mode, or the ``network`` of a ``LoraGenerator``. If it is
            sharded over processes, all must call this.
        tasks: Names of the tasks to compare; None for all.

    Returns:
        Cosines, norms, singular values, the share of the updates that the task explains, and which are at their bound.

    Raises:
        TypeError: If `tasks` holds anything but names.
        ValueError: If a task is unknown or named twice, several adapters are active, an update is not finite, or
            parameters are partitioned by DeepSpeed's ZeRO-3 and not gathered.
    """
    diagnosis = measure(model, tasks)
    count = len(diagnosis.tasks)
    adapter_name, _ = active_network(model)
    if diagnosis.is_zero:
        warnings.warn(
            f"All updates of adapter {adapter_name!r} are zero: it computes exactly what the base model "
            "does. It is untrained; train it, or load its weights.",
            stacklevel=2,
        )
    elif diagnosis.is_collapsed:
        warnings.warn(
            f"The hypernetwork of adapter {adapter_name!r} ignores its condition: only "
            f"{diagnosis.share:.2%} of the updates depend on the task (below {COLLAPSED_SHARE:.0%}; "
            f"{1 - 1 / count:.0%} for {count} unrelated tasks), so all tasks share one adapter. Check that "
            "each row is trained with its own task, train longer or with a higher learning rate; if the tasks are that "
            "similar, a single task does as well.",
            stacklevel=2,
        )
    return diagnosis


def measure(model: nn.Module, tasks: Sequence[str] | None = None) -> Diagnosis:
    """As ``diagnose``, without a warning."""
    network = whole_network(active_network(model)[1])
    if isinstance(tasks, str):
        raise TypeError(f"tasks={tasks!r} must be a list of task names, or None for all.")
    names = network.config.task_names if tasks is None else list(tasks)
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"tasks names {duplicates} more than once; name every task once.")
    return _measure(network, names)


@torch.no_grad()
def _measure(network: HyperAdapterNetwork, names: Sequence[str]) -> Diagnosis:
    generated: dict[str, Factors] = network(resolve_task_ids(names, network.config.task_names))
    # One position after the other, so that only one is there in float64.
    products = torch.stack([_products(factors) for factors in generated.values()]).cpu()
    squared = products.diagonal(dim1=1, dim2=2)
    broken = (~squared.isfinite()).nonzero().tolist()
    if broken:
        position, task = list(generated)[broken[0][0]], names[broken[0][1]]
        raise ValueError(
            f"The update of task {task!r} at {position!r} is not finite: training has diverged. Go back to an earlier "
            "checkpoint, and train with a lower learning rate."
        )
    bound_shares = network.bound_shares(generated)
    base_norms = dict(zip((position.name for position in network.positions), network.position_norms, strict=True))
    squared_base = torch.stack([base_norms[name] for name in generated]).double().square().cpu()
    return Diagnosis(
        tasks=tuple(names),
        positions=tuple(generated),
        share=float(_shares(products.sum(0))),
        position_shares=_shares(products),
        cosines=_cosines(products.sum(0)),
        norms=(squared / squared_base[:, None]).sqrt(),
        task_norms=(squared.sum(0) / squared_base.sum()).sqrt(),
        singular_values={name: spectrum(factors).cpu() for name, factors in generated.items()},
        bound_shares=torch.stack([bound_shares[name] for name in generated]).double().cpu() if bound_shares else None,
    )


def _products(factors: Factors) -> Tensor:
    """Inner products of the tasks' updates of one position, those of its experts together, shape (T, T)."""
    return torch.stack([pairwise_inner_products(one, one) for one in factors.of_weights()]).sum(0)


def _shares(products: Tensor) -> Tensor:
    """Share that the task explains, from inner products of shape (..., T, T)."""
    total = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    own = total - products.sum((-2, -1)) / products.shape[-1]
    # Rounding may leave equal updates a difference below zero.
    return own.clamp(min=0) / total


def _cosines(products: Tensor) -> Tensor:
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return products / norms[..., :, None] / norms[..., None, :]


def _stable_rank(values: Tensor) -> Tensor:
    """‖ΔW‖_F² / ‖ΔW‖₂² of every task, NaN for an update of zero."""
    return values.square().sum(-1) / values[..., 0].square()
