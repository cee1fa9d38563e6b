"""Fitting a hypernetwork to a library of ordinary LoRAs, without data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hyperadapt.config.checks import check_integer, check_number, shown
from hyperadapt.hypernetwork.factors import Factors
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.positions import Position
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.hypernetwork.updates import inner_product
from hyperadapt.loras.reading import LoraFile, read_lora
from hyperadapt.normalization.precision import own_dtype
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.active import active_network, find_tuner

_MAX_STEPS = 10**9
# Adam's first steps are of full size in every entry, whatever the gradient; a short rise keeps them from mattering.
_WARMUP_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Distillation:
    """What a fit to a library of LoRAs has reached.

    Args:
        error: By task the relative error ``√(Σ‖ΔW - ΔW_LoRA‖² / Σ‖ΔW_LoRA‖²)``, sums over positions (dimensionless):
            0 is exact, 1 is what no adapter has.
        losses: Mean squared relative error over the tasks of each step.
        adapter_parameters: Numbers that the hyperadapter saves.
        adapter_bytes: Their size.
        lora_parameters: Numbers in the LoRAs' files, all together.
        lora_bytes: Their size.
    """

    error: dict[str, float]
    losses: tuple[float, ...]
    adapter_parameters: int
    adapter_bytes: int
    lora_parameters: int
    lora_bytes: int

    def __str__(self) -> str:
        rows = [f"{task:<24}{error:>16.3f}" for task, error in self.error.items()]
        return "\n".join(
            [
                f"{len(self.error)} LoRAs fitted in {len(self.losses)} steps",
                f"{'task':<24}{'relative error':>16}",
                *rows,
                f"{self.adapter_parameters:,} numbers instead of {self.lora_parameters:,} "
                f"({self.adapter_parameters / self.lora_parameters:.1%}); {self.adapter_bytes:,} bytes instead of "
                f"{self.lora_bytes:,} ({self.adapter_bytes / self.lora_bytes:.1%})",
            ]
        )


class _Group(NamedTuple):
    """The positions of one shape, and what is to be generated there."""

    names: list[str]
    # The LoRAs' updates with leading dimensions (tasks, positions), padded to one rank with zeros.
    targets: Factors


# Around the call, training may be off.
@torch.inference_mode(False)
def distill(  # noqa: DOC503
    model: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    tasks_per_step: int | None = None,
    seed: int = 0,
) -> Distillation:
    """Fit the active adapter to a library of ordinary LoRAs, one folder per task; needs no data.

    Minimises the relative squared distance of the updates, ``Σ‖ΔW - s·B·A‖² / Σ‖s·B·A‖²`` with sums over a task's
    positions, averaged over tasks. It is computed from Gram matrices: the updates are not formed, and the factors,
    which are not unique, are not compared. The LoRAs' ranks may differ from the hyperadapter's and from each other;
    where a LoRA adapts nothing, its update is zero. Adam with a cosine schedule; only the adapter's network is trained.
    Tasks of the adapter that are not in `adapters` change along with what all tasks share.

    For a given size of the file, ``head="pair"`` left the smallest error, and half of the LoRAs' rank with a wider
    network a smaller one than their rank (see ``examples/distill_loras.py`` and ``DECISIONS.md``).

    The default normalisation bounds an update by a fifth of the base weight's norm, or less; a LoRA that exceeds it
    needs a larger ``normalization_bound``, or ``normalization="none"``.

    Source: the reconstruction loss of Text-to-LoRA (arXiv 2506.06105), on the updates instead of the factors.

    Args:
        model: A ``PeftModel`` with a hyperadapter that adapts (at least) the LoRAs' modules. Left as it was, trained
            weights apart, and on an error entirely.
        adapters: Task name to the folder of its LoRA.
        steps: Number of optimiser steps.
        learning_rate: Adam's peak learning rate. One far too high throws the updates so far away that they never come
            back, with errors near 1.
        tasks_per_step: How many tasks, drawn at random, a step fits; None for all. Bounds the memory that a large
            library takes on the accelerator.
        seed: Seed of the draws, those of tasks' descriptions included. PyTorch's random state stays as it was.

    Returns:
        The errors left, and the sizes.

    Raises:
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If a LoRA's folder or file is missing.
        ValueError: If a task is unknown, a LoRA is no plain LoRA, is zero or does not fit the model, a value is out of
            range, the fit diverges, or the adapter is not alone active, merged, sharded or made in inference mode.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters={shown(adapters)} must be a mapping from task name to LoRA folder.")
    if not adapters:
        raise ValueError("adapters is empty; give the folder of a LoRA for every task.")
    check_integer("steps", steps, _MAX_STEPS)
    check_number("learning_rate", learning_rate)
    if tasks_per_step is not None:
        check_integer("tasks_per_step", tasks_per_step, len(adapters))
    network = _trainable_network(model)
    task_ids = resolve_task_ids(list(adapters), network.config.task_names)
    positions = {position.name: position for position in network.positions}
    fused = [name for name, position in positions.items() if position.experts]
    if fused:
        raise ValueError(
            f"The hyperadapter adapts fused experts, {shown(fused)}, whose factors cannot be distilled from files "
            "yet. Make one without target_parameters for the LoRAs' modules."
        )
    loras = [read_lora(task, folder, positions) for task, folder in adapters.items()]
    groups = _grouped(network.positions, loras)
    squared_norms = _squared_norms(groups)
    for task, squared_norm in zip(adapters, squared_norms.tolist(), strict=True):
        if not squared_norm:
            raise ValueError(
                f"The LoRA of task {task!r} in {str(adapters[task])!r} is zero: it is untrained. Leave it out, or "
                "train it."
            )
    problem = _Problem(network, task_ids, groups, squared_norms)
    with _trainable(network), own_dtype(network.hypernetwork.layer_embedding.device):
        if network.warmup is not None:
            # Its reason, the noise of the first batches, is not there where the goal is known.
            network.warmup.finish()
        losses = _fit(problem, steps, learning_rate, tasks_per_step or len(loras), seed)
        errors = _errors(problem, tasks_per_step or len(loras))
    saved = list(network.state_dict().values())
    return Distillation(
        error=dict(zip(adapters, errors, strict=True)),
        losses=tuple(losses),
        adapter_parameters=sum(tensor.numel() for tensor in saved),
        adapter_bytes=sum(tensor.nbytes for tensor in saved),
        lora_parameters=sum(lora.parameters for lora in loras),
        lora_bytes=sum(lora.num_bytes for lora in loras),
    )


class _Problem(NamedTuple):
    """What is to be fitted."""

    network: HyperAdapterNetwork
    # Shape (tasks,).
    task_ids: Tensor
    groups: list[_Group]
    # Of the tasks' targets over all positions, shape (tasks,), float64.
    squared_norms: Tensor


def _fit(problem: _Problem, steps: int, learning_rate: float, tasks_per_step: int, seed: int) -> list[float]:
    """Train; returns the loss of every step."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=learning_rate)
    warmup = max(1, round(_WARMUP_SHARE * steps))
    losses = []
    for step in range(steps):
        rows = torch.randperm(len(problem.task_ids))[:tasks_per_step]
        optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, steps, warmup)
        loss = _squared_errors(problem, rows, torch.float32).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"The fit diverged in step {step + 1} of {steps} with learning_rate={learning_rate}: the loss is "
                f"{losses[-1]}. The adapter is as it was before; use a lower learning rate."
            )
    return losses


@torch.no_grad()
def _errors(problem: _Problem, tasks_per_step: int) -> list[float]:
    """Relative error of every task, in float64."""
    parts = torch.split(torch.arange(len(problem.task_ids)), tasks_per_step)
    squared = torch.cat([_squared_errors(problem, rows, torch.float64).cpu() for rows in parts])
    # Rounding may leave an exact fit an error below zero.
    errors: list[float] = squared.clamp(min=0).sqrt().tolist()
    return errors


def _squared_errors(problem: _Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared relative error of some tasks, shape (rows,)."""
    generated: dict[str, Factors] = problem.network(problem.task_ids[rows])
    # The distance but for the target's own squared norm.
    changes = []
    for names, targets in problem.groups:
        parts = zip(*(generated[name] for name in names), strict=True)
        own = Factors(*(torch.stack(part, 1).to(dtype) for part in parts))
        wanted = Factors(*(tensor[rows].to(own.lora_A.device, dtype) for tensor in targets))
        changes.append((inner_product(own, own) - 2 * inner_product(own, wanted)).sum(1))
    change = torch.stack(changes).sum(0)
    return 1 + change / problem.squared_norms[rows].to(change)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear rise, then half a cosine down to (nearly) zero."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _grouped(positions: Sequence[Position], loras: Sequence[LoraFile]) -> list[_Group]:
    groups: dict[tuple[int, int, int], list[Position]] = {}
    for position in positions:
        groups.setdefault((position.in_features, position.out_features, position.r), []).append(position)
    return [_Group([member.name for member in members], _stacked(members, loras)) for members in groups.values()]


def _stacked(positions: Sequence[Position], loras: Sequence[LoraFile]) -> Factors:
    """The LoRAs' updates at positions of one shape, in float32, on the CPU."""
    updates = [[lora.updates.get(position.name) for position in positions] for lora in loras]
    ranks = [update.lora_A.shape[0] for row in updates for update in row if update is not None]
    # One at least, since a core of size 0 cannot be told from a number.
    r, shape = max(ranks, default=1), (len(loras), len(positions))
    stacked = Factors(
        torch.zeros(*shape, r, positions[0].in_features),
        torch.zeros(*shape, positions[0].out_features, r),
        torch.zeros(*shape, r, r),
    )
    for task, row in enumerate(updates):
        for index, update in enumerate(row):
            for padded, tensor in zip(stacked, update or (), strict=False):
                padded[task, index, : tensor.shape[0], : tensor.shape[1]] = tensor
    return stacked


def _squared_norms(groups: Sequence[_Group]) -> Tensor:
    """Squared norm of each task's targets, summed over positions, shape (tasks,), float64."""
    doubled = [Factors(*(tensor.double() for tensor in group.targets)) for group in groups]
    return torch.stack([inner_product(targets, targets).sum(1) for targets in doubled]).sum(0)


def _trainable_network(model: nn.Module) -> HyperAdapterNetwork:
    """The network of the only active adapter, if it can be trained here and now."""
    name, network = active_network(model)
    merged = find_tuner(model).router.merged
    if name in merged:
        raise ValueError(
            f"Task {merged[name]!r} of adapter {name!r} is merged into the base weights, which would keep "
            "its old update. Call unmerge_adapter() first."
        )
    if whole_network(network) is not network:
        raise ValueError(
            f"Adapter {name!r} is sharded over processes, but distill runs in one: it takes no activations, so the "
            "adapter alone fits. Distil it before sharding the model."
        )
    if any(tensor.is_inference() for tensor in network.state_dict().values()):
        raise ValueError(
            f"Adapter {name!r} was made inside of torch.inference_mode, where nothing can be trained afterwards. Make "
            "or load it outside."
        )
    return network


@contextmanager
def _trainable(network: HyperAdapterNetwork) -> Iterator[None]:
    """Train all parameters, then put back what that takes: modes, random state, and after an error the weights."""
    # In training, a task with descriptions learns each of them, and to be known by them alone.
    modes = [(module, module.training) for module in network.modules()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        # Seeding seeds every device.
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            network.train()
            for parameter, _, _ in before:
                parameter.requires_grad_(True)
                parameter.grad = None
            yield
    except BaseException:
        network.load_state_dict(state)
        raise
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
