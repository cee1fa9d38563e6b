"""How cost grows with tasks, rank and layers: `python -m benchmarks.growth`.

One of the three is varied at a time from a middle point (10 tasks, rank 16, 8 layers), on a Llama of random weights
with hidden size 256, all linear layers adapted, with the defaults of ``HyperAdapterConfig``. A step has 16 rows of 32
tokens, of as many tasks as there are, at most 16: forward, backward and AdamW, in float32.

The other method is a PEFT LoRA for each task. One is made and measured. All of them have N times its parameters, its
folder and its optimiser's state; a step trains one of them, with as many rows, and takes the same time whatever N is.
So its times over tasks are one measurement.

- step seconds, adapter seconds: CPU seconds, the median over repetitions (20% and 80% quantiles in the rows). In each
  repetition every point of every method has its turn, so that a slow moment of the machine hits all alike.
- adapter seconds: from the method's own form to all factors of one task, in memory: the hypernetwork generates and
  normalises them, without gradient; a LoRA is read from its file, which the system has in its cache.
- step bytes: what a step holds at most beside the frozen model: trained parameters and AdamW's two moments (12 bytes a
  parameter; of all N LoRAs, loaded to be trained in turn), gradients (4 bytes a parameter; of one LoRA), and the
  distinct tensors that autograd saves for backward, parameters left out. Counted, not read from the system.
- folder bytes: of the folder that ``save_pretrained`` writes.

An exponent is the slope of a line through log cost over log size, over all sizes of the axis.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.rows import environment, save_rows
from benchmarks.growth.report import Row, report
from hyperadapt import HyperAdapterConfig
from hyperadapt.tuner.active import find_tuner

METHODS = ("hyperadapt", "N LoRAs")
QUANTILES = (0.2, 0.5, 0.8)
ROWS, LENGTH = 16, 32
STATE_BYTES, GRADIENT_BYTES = 12, 4
"""For each trained parameter: itself and AdamW's moments; its gradient. All float32."""
AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 10, 100, 1000),
    "rank": (4, 8, 16, 32, 64),
    "layers": (2, 4, 8, 16, 32, 48),
}
MIDDLE = {"tasks": 10, "rank": 16, "layers": 8}
FAST_AXES: dict[str, tuple[int, ...]] = {"tasks": (1, 3), "rank": (2, 4), "layers": (1, 2)}
FAST_MIDDLE = {"tasks": 3, "rank": 2, "layers": 1}


class Size(NamedTuple):
    """A point of the study.

    Attributes:
        tasks: Number of tasks.
        rank: Rank of every adapter.
        layers: Layers of the base model.
    """

    tasks: int
    rank: int
    layers: int


class Case:
    """One method at one size: its model, and the calls to time.

    Args:
        method: One of ``METHODS``.
        size: The size. For LoRA, one of its tasks.
        hidden_size: Of the base model.
        folder: Where to save the adapter.

    Attributes:
        parameters: Trained parameters.
        folder_bytes: Size of the saved folder.
        saved_bytes: See the function of that name.
        adapter: Brings all factors of one task into memory.
    """

    def __init__(self, method: str, size: Size, hidden_size: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = get_peft_model(_base_model(size.layers, hidden_size), _adapter(method, size)).train()
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, 1e-4)
        ids = torch.randint(self.model.config.vocab_size, (ROWS, LENGTH))
        self._batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if method == "hyperadapt":
            self._batch["tasks"] = torch.arange(ROWS) % size.tasks
        self.parameters = sum(parameter.numel() for parameter in self._parameters)
        self.model.save_pretrained(str(folder))
        self.folder_bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._file = folder / "adapter_model.safetensors"
        self.saved_bytes = saved_bytes(self.model, self._loss)
        self.adapter = self._generate if method == "hyperadapt" else self._read

    def step(self) -> None:
        """Train for one step."""
        self._loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self) -> Any:
        return self.model(**self._batch).loss

    @torch.no_grad()
    def _generate(self) -> None:
        find_tuner(self.model).router.network("default")(torch.tensor([0]))

    def _read(self) -> None:
        load(self._file.read_bytes())


def _base_model(layers: int, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _adapter(method: str, size: Size) -> PeftConfig:
    settings: dict[str, Any] = {"r": size.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "hyperadapt":
        return HyperAdapterConfig(tasks=[f"task {index}" for index in range(size.tasks)], **settings)
    return LoraConfig(**settings)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Memory that a forward pass keeps for its backward pass.

    Args:
        model: Its parameters and buffers do not count.
        forward: Calls the model.

    Returns:
        Bytes of the distinct storages that autograd saves.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        # Detached, or an output that is saved would keep its own graph alive.
        return tensor.detach()

    # The output is held until all are counted: its graph keeps what is saved, so that no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(saved.values())


def measure(cases: dict[tuple[str, Size], Case], repetitions: int) -> dict[tuple[str, Size], dict[str, list[float]]]:
    """Time all cases in turn, several times.

    Args:
        cases: The cases.
        repetitions: How often; one before them is not counted.

    Returns:
        For each case the CPU seconds of its calls, by name.
    """
    seconds: dict[tuple[str, Size], dict[str, list[float]]] = {key: {"step": [], "adapter": []} for key in cases}
    for repetition in range(repetitions + 1):
        for key, case in cases.items():
            for name, call in (("step", case.step), ("adapter", case.adapter)):
                started = time.process_time()
                call()
                if repetition:
                    seconds[key][name].append(time.process_time() - started)
    return seconds


def rows_of(axes: dict[str, tuple[int, ...]], middle: dict[str, int], hidden_size: int, repetitions: int) -> list[Row]:
    """Measure all points of all axes.

    Args:
        axes: The sizes of each axis.
        middle: Where the others stand while one is varied.
        hidden_size: Of the base model.
        repetitions: Of the times.

    Returns:
        A row for each axis, size and method; a size on several axes is measured once.
    """
    points = [(axis, Size(**{**middle, axis: value})) for axis, values in axes.items() for value in values]
    keys = {(size, method): _measured(size, method) for _, size in points for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            key: Case(*key, hidden_size, Path(folder, str(index)))
            for index, key in enumerate(dict.fromkeys(keys.values()))
        }
        seconds = measure(cases, repetitions)
    rows = []
    for axis, size in points:
        for method in METHODS:
            key = keys[size, method]
            times = {
                f"{name}_seconds": [float(f"{value:.4g}") for value in np.quantile(values, QUANTILES)]
                for name, values in seconds[key].items()
            }
            copies = size.tasks if method == "N LoRAs" else 1
            case = cases[key]
            counts = {
                "parameters": copies * case.parameters,
                "folder_bytes": copies * case.folder_bytes,
                "step_bytes": (copies * STATE_BYTES + GRADIENT_BYTES) * case.parameters + case.saved_bytes,
            }
            rows.append({"axis": axis, **size._asdict(), "method": method, **counts, **times})
    return rows


def _measured(size: Size, method: str) -> tuple[str, Size]:
    """What is measured for a size and method: of N LoRAs, one."""
    return method, size._replace(tasks=1) if method == "N LoRAs" else size


def main() -> None:
    """Measure, write the rows, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--fast", action="store_true", help="small sizes, two repetitions: a test")
    parser.add_argument("--output", "--results", type=Path, default=Path("runs/growth"))
    options = parser.parse_args()
    axes, middle = AXES, MIDDLE
    if options.fast:
        axes, middle = FAST_AXES, FAST_MIDDLE
        options.hidden_size, options.repetitions = 32, 2
    # The environment is read first: the code may be another by the end of a long run.
    shared = environment() | {"hidden_size": options.hidden_size, "repetitions": options.repetitions, "seed": 0}
    rows = [shared | row for row in rows_of(axes, middle, options.hidden_size, options.repetitions)]
    save_rows(options.output / "growth.jsonl", rows)
    report(rows, options.output)


if __name__ == "__main__":
    main()
