"""One of two processes that train a tiny model together, by one of several engines."""

import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hyperadapt import export_lora
from hyperadapt.trainer.monitor import PositionMonitor
from tests.support.example_rows import rows_of
from tests.support.helpers import (
    BILINEAR,
    TASKS,
    adapted_model,
    adapter_parameters,
    enable_checkpointing,
    example_batch,
)

PROCESSES = 2
STEPS = 3
LEARNING_RATE = 0.02
# The processes see different tasks, and the second sees one alone.
IDS = torch.tensor([0, 1, 2, 2])
BATCH = example_batch("llama")
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}
# Heads, gains, learned bounds and those that grow each take part in other ways.
METHODS: dict[str, dict[str, Any]] = {
    "soft_frobenius": {"normalization": "soft_frobenius", "normalization_bound": 0.5},
    "spectral, rows": {"normalization": "spectral", "head": "row"},
    "soft_polar": {"normalization_warmup": STEPS, "own_factors": ["beta"]},
    "adaptive": {"normalization": "adaptive"},
    "sinkhorn": {"normalization": "sinkhorn"},
    "text, bilinear": {
        "tasks": {"alpha": "find the topic", "beta": "is it spam", "gamma": "who wrote it"},
        "task_embedding": "text",
        **BILINEAR,
    },
    # One row of each task, so that it is no matter which are drawn.
    "examples": {"task_embedding": "examples", "task_type": "CAUSAL_LM"},
}
ENGINES = ("ddp", "fsdp2", "fsdp2_network_apart", "zero2", "zero3")


def make_model(method: str, checkpointing: str) -> PeftModel:
    model = adapted_model("llama", **METHODS[method]).train()
    if method == "examples":
        model.set_examples({task: rows_of("llama", 1, seed) for seed, task in enumerate(TASKS)})
    use_reentrant = CHECKPOINTING[checkpointing]
    if use_reentrant is not None:
        model.config.use_cache = False
        enable_checkpointing(model, use_reentrant)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train(model: nn.Module, rows: slice, step: Callable[[Tensor], None]) -> None:
    local = {name: value[rows] for name, value in BATCH.items()}
    for _ in range(STEPS):
        step(model(**local, tasks=IDS[rows]).loss)


def torch_step(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare(engine: str, model: PeftModel) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """The model as the engine wraps it, and what trains it by a loss."""
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
        return wrapped, torch_step(optimizer_of(model))
    if engine.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        if engine == "fsdp2_network_apart":
            fully_shard(model.base_model.router.network("default"), mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch_step(optimizer_of(model))
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": len(IDS) // PROCESSES,
        "zero_optimization": {"stage": int(engine.removeprefix("zero")), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)

    def step(loss: Tensor) -> None:
        wrapped.backward(loss)
        wrapped.step()

    return wrapped, step


def kind_of(wrapped: nn.Module) -> str:
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, FSDPModule):
        return "fsdp2"
    return f"zero{wrapped.zero_optimization_stage()}"


def gathered(engine: str, model: nn.Module) -> Any:
    """Context in which a model's parameters are whole."""
    if engine != "zero3":
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def run(rank: int, engine: str, cases: list[tuple[str, str]], port: int, folder: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = slice(2 * rank, 2 * rank + 2)
    results = []
    for case in cases:
        model = make_model(*case)
        # As the trainer does, before the engine wraps the model.
        monitor = PositionMonitor(model.base_model.router.network("default"))
        wrapped, step = prepare(engine, model)
        sizes = {name: local_size(parameter) for name, parameter in adapter_parameters(model).items()}
        train(wrapped, rows, step)
        with gathered(engine, model):
            weights = {name: whole(parameter) for name, parameter in adapter_parameters(model).items()}
        result = {"sizes": sizes, "weights": weights, "kind": kind_of(wrapped), "world": dist.get_world_size()}
        results.append(result | {"watched": watched(monitor), "counted": counted_steps(model)})
    if engine == "zero3":
        partitioned = "is partitioned by DeepSpeed's ZeRO-3, so this process has none of its entries"
        with pytest.raises(ValueError, match=partitioned):
            model.save_pretrained(folder / "none")
        with pytest.raises(ValueError, match=partitioned):
            export_lora(model, "beta", folder / "none")
        assert not list(folder.glob("none/*.safetensors"))
        # What Trainer and Accelerate do: the whole state is gathered first, in the first process.
        with gathered(engine, model):
            state_dict = {name: value.clone() for name, value in model.state_dict().items()} if rank == 0 else {}
        model.save_pretrained(folder / "given", state_dict=state_dict, is_main_process=rank == 0)
    with gathered(engine, model):
        model.save_pretrained(folder / "adapter", is_main_process=rank == 0)
        export_lora(model, "beta", folder / f"lora-{rank}")
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()


def counted_steps(model: PeftModel) -> int | None:
    """The optimizer steps that the bound's warm-up has seen; None without one."""
    warmup = model.base_model.router.network("default").warmup
    return None if warmup is None else int(warmup.trained_steps)


def watched(monitor: PositionMonitor) -> tuple[dict[str, float], dict[str, float]]:
    """The largest updates, by position, and the shares of saturated ones, by layer."""
    updates, _, saturation = monitor.collect()
    return updates, dict(saturation.layers)


def local_size(parameter: Tensor) -> int:
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def main(rank: int, *arguments: Any) -> None:
    code = 0
    try:
        run(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Not an orderly end: it can wait forever for a thread of gloo's that itself waits for the interpreter's lock.
    os._exit(code)
