"""Operator calls of each normalisation, from factors to cores and back: `python -m benchmarks.launches`.

Counted on the device "meta", without a GPU: each call that is no view is one launch of a kernel or more, a kernel of
this package exactly one. "formulas" is what runs where no kernel serves but that of the Gram matrices, "kernels" what
runs on a GPU. Then the same of a training step (forward and backward) of the model of `python -m benchmarks.speed`, 16
rows of 64 tokens, without the optimizer. Under autocast to bfloat16, which "meta" does not know, the step is counted on
the CPU, by formulas.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.rows import Row, save_rows
from benchmarks.speed.arms import LORA, NORMALIZED, Scenario, build_base, build_subject, example_batch
from benchmarks.speed.calls import loss_call
from hyperadapt.normalization import cores, gram
from hyperadapt.normalization.formulas import METHODS, NORMALIZATIONS

META = torch.device("meta")
TASKS, POSITIONS, R = 8, 24, 16
# (in, out) of the linear layers of Qwen2.5-0.5B.
SHAPES = ((896, 896), (896, 128), (896, 4864), (4864, 896))


class Calls(TorchDispatchMode):
    """Counts operator calls; a view is none.

    Attributes:
        total: The number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not func.is_view
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernels(serve: bool) -> Iterator[None]:
    """Take kernels, or formulas, on the device "meta".

    Args:
        serve: Whether kernels serve.

    Yields:
        Nothing.
    """

    def answer(tensor: Tensor) -> bool:
        return serve

    with mock.patch.object(gram, "kernels_serve", answer), mock.patch.object(cores, "kernels_serve", answer):
        yield


def core_calls(method: str, serve: bool) -> tuple[int, int]:
    """Calls from factors to cores, and from the cores' gradients to the factors'.

    Args:
        method: The normalisation.
        serve: Whether kernels serve.

    Returns:
        Forward and backward.
    """
    rows = [[torch.empty(TASKS, POSITIONS, R, width[side], device=META) for width in SHAPES] for side in (0, 1)]
    factors = [factor.requires_grad_() for side in rows for factor in side]
    pairs = POSITIONS * len(SHAPES)
    needed = {"bound": torch.empty(pairs, device=META), "logits": torch.empty(TASKS, pairs, R, R, device=META)}
    options = {name: needed[name] for name in METHODS[method].needs}
    with kernels(serve):
        with Calls() as forward:
            core = cores.cores(*rows, METHODS[method], options)
        direction = torch.empty_like(core)
        with Calls() as backward:
            if core.requires_grad:
                torch.autograd.grad(core, factors, direction, allow_unused=True)
    return forward.total, backward.total


def step_calls(arm: str, serve: bool, scenario: Scenario) -> int:
    """Calls of a training step.

    Args:
        arm: Name of the arm.
        serve: Whether kernels serve.
        scenario: The scenario.

    Returns:
        Forward and backward together.
    """
    subject = build_subject(arm, build_base(scenario.base, torch.device("cpu")), scenario)
    subject.model.to(META)
    subject.routing = {name: value.to(META) for name, value in subject.routing.items()}
    # Transformers looks at the values of a mask.
    loss = loss_call(subject, {"input_ids": example_batch(scenario, torch.device("cpu"))["input_ids"].to(META)})
    with kernels(serve):
        # The first call also learns where rows lie.
        loss()
        with Calls() as calls:
            torch.autograd.backward(loss())
    return calls.total


def autocast_calls(arm: str, scenario: Scenario) -> int:
    """Calls of a training step on the CPU under autocast to bfloat16.

    Args:
        arm: Name of the arm.
        scenario: The scenario.

    Returns:
        Forward and backward together.
    """
    cpu = torch.device("cpu")
    subject = build_subject(arm, build_base(scenario.base, cpu), scenario)
    model, ids = subject.model.train(), example_batch(scenario, cpu)["input_ids"]

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result: Tensor = model(input_ids=ids, labels=ids, **subject.routing).loss
        return result

    loss()
    with Calls() as calls:
        torch.autograd.backward(loss())
    return calls.total


def main() -> None:
    """Count, print a line per row, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/launches"))
    options = parser.parse_args()
    rows: list[Row] = []
    print(f"{'':<16}{'formulas':>18}{'kernels':>18}")
    print(f"{'cores':<16}" + f"{'forward':>9}{'backward':>9}" * 2)
    for method in NORMALIZATIONS:
        both = {"formulas": core_calls(method, False), "kernels": core_calls(method, True)}
        print(f"{method:<16}" + "".join(f"{calls:>9}" for pair in both.values() for calls in pair))
        rows += [
            {"method": method, "by": by, "forward": forward, "backward": backward}
            for by, (forward, backward) in both.items()
        ]
    print(f"\n{'training step':<28}{'tasks':>5}{'formulas':>10}{'kernels':>9}{'formulas, autocast':>20}")
    for tasks in (1, 16):
        scenario = Scenario(tasks=tasks)
        for arm in (LORA, *NORMALIZED):
            steps = {by: step_calls(arm, by == "kernels", scenario) for by in ("formulas", "kernels")}
            autocast = autocast_calls(arm, scenario)
            print(f"{arm:<28}{tasks:>5}{steps['formulas']:>10}{steps['kernels']:>9}{autocast:>20}", flush=True)
            rows += [{"arm": arm, "by": by, "tasks": tasks, "step": calls} for by, calls in steps.items()]
            rows.append({"arm": arm, "by": "formulas, autocast", "tasks": tasks, "step": autocast})
    save_rows(options.output / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
