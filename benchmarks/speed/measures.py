"""Measurements of the speed benchmark: time in turns, memory, and what is measured once for the package itself."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.scaling import CONFIGS, adapted
from benchmarks.speed.arms import build_base
from benchmarks.speed.calls import Call
from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tuner.active import find_tuner

TURN_MS = 50.0
Turns = dict[str, list[float]]

# Both in one process, so that what a busy machine adds to PEFT's own seconds is not counted.
_IMPORTS = """
import importlib, sys, time
started = time.perf_counter()
importlib.import_module(sys.argv[1])
between = time.perf_counter()
importlib.import_module(sys.argv[2])
print(between - started, time.perf_counter() - between)
"""


def take_turns(arms: dict[str, Call], turns: int, device: torch.device) -> Turns:
    """Time arms in turns: in each, every arm is repeated for at least ``TURN_MS``.

    Every second turn goes through the arms backwards, so that none always follows the same one.

    Args:
        arms: What to time, by name.
        turns: Number of turns.
        device: Where the arms run.

    Returns:
        Milliseconds per call of each turn, by arm.
    """
    for arm in arms.values():
        arm()
    calls = {name: math.ceil(TURN_MS / _turn(arm, 1, device)) for name, arm in arms.items()}
    times: Turns = {name: [] for name in arms}
    for index in range(turns):
        for name in reversed(arms) if index % 2 else arms:
            times[name].append(_turn(arms[name], calls[name], device))
    return times


def _turn(arm: Call, calls: int, device: torch.device) -> float:
    """Milliseconds per call."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        arm()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - started) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """What a forward pass keeps for its backward pass.

    Args:
        forward: Returns the loss.
        model: The model, whose parameters and buffers are not counted.

    Returns:
        Bytes of the distinct storages.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        # A node that held its own output would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until all is counted: freed storages would be reused, and counted once.
        loss = forward()
    del loss
    return sum(sizes.values())


def peak_bytes(step: Call) -> int:
    """Peak memory of a training step on a GPU, beyond what was allocated before it: activations and gradients.

    Args:
        step: The step.

    Returns:
        Bytes.
    """
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def import_seconds(first: str, added: str, turns: int) -> Turns:
    """Time to import a module, and what another one adds to it, each turn in a new process.

    Args:
        first: The module that is imported first.
        added: The module that is imported then.
        turns: Number of processes.

    Returns:
        Seconds by module.
    """
    times: Turns = {first: [], added: []}
    for _ in range(turns):
        command = [sys.executable, "-c", _IMPORTS, first, added]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        for name, seconds in zip(times, map(float, printed.split()), strict=True):
            times[name].append(seconds)
    return times


def adapter_network(base: str, r: int) -> HyperAdapterNetwork:
    """The network of a hyperadapter on all linear layers of a base model, without the base model.

    Args:
        base: Name of the base model in ``benchmarks.scaling``.
        r: Rank.

    Returns:
        The network, in evaluation mode.
    """
    config = HyperAdapterConfig(r=r, tasks=["a", "b"], target_modules="all-linear", task_type="CAUSAL_LM")
    positions = find_tuner(adapted(CONFIGS[base], config)).router.network("default").positions
    return HyperAdapterNetwork(config, positions, torch.ones(len(positions))).eval()


def generation_seconds(network: HyperAdapterNetwork, turns: int) -> list[float]:
    """Time to generate all adapters of one task.

    Args:
        network: The network, on the CPU.
        turns: Number of turns.

    Returns:
        Seconds of each turn.
    """

    def generate() -> object:
        with torch.no_grad():
            return network(torch.tensor([0]))

    return [milliseconds / 1e3 for milliseconds in take_turns({"": generate}, turns, torch.device("cpu"))[""]]


def life_cycle_seconds(base: str, tasks: int) -> dict[str, float]:
    """Build, save and load a hyperadapter with many tasks.

    Args:
        base: Name of the base model.
        tasks: Number of tasks.

    Returns:
        Seconds of each of the three.
    """
    names = [f"task{index}" for index in range(tasks)]
    base_models = [build_base(base, torch.device("cpu")) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        config = HyperAdapterConfig(tasks=names, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(base_models[0], config)
        built = time.perf_counter()
        model.save_pretrained(folder)
        saved = time.perf_counter()
        PeftModel.from_pretrained(base_models[1], folder)
        loaded = time.perf_counter()
    return {"build": built - started, "save": saved - built, "load": loaded - saved}
