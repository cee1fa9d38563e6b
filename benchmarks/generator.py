"""Tasks as LoRAs without their base model: `python -m benchmarks.generator`.

Hyperadapters with the shapes of well-known models and random weights, all linear layers, 16 tasks; rank 16, and for
MiniLM the default of 8. On the CPU:

Seconds are those of the clock, and those of the processor, which tell more where a machine has other work.

- cold: a whole process that exports one task, imports included, in turns with `python -c "import peft"`, and its peak
  memory. For MiniLM's shapes also as it was done before: with the base model, random weights in float32;
- warm: one more task in memory, in a process that runs;
- many: 1,000 tasks of MiniLM's shapes to the disk, in turns of 250 with safetensors, which writes the same tensors to a
  folder for each; and the peak memory of a process that writes 10,000, beside one that writes 100.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, BertConfig, LlamaConfig, PretrainedConfig
from transformers.utils import logging

from benchmarks.common.rows import Row, save_rows
from benchmarks.scaling import CONFIGS
from hyperadapt import HyperAdapterConfig, LoraGenerator
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tuner.active import find_tuner

RANK = {"MiniLM": 8, "Llama-3-8B": 16, "Llama-3-70B": 16, "tiny": 16}
MB = 1e6
# Of all shapes that are made; the last is the fast form's.
SHAPES: dict[str, PretrainedConfig] = {
    "MiniLM": BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, vocab_size=30522
    ),
    "Llama-3-8B": CONFIGS["Llama-3-8B"],
    "Llama-3-70B": CONFIGS["Llama-3-70B"],
    "tiny": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    ),
}
WITH_BASE = """
import sys
import hyperadapt
from peft import PeftModel
from transformers import AutoModel
base = AutoModel.from_pretrained(sys.argv[1] + "/base")
hyperadapt.export_lora(PeftModel.from_pretrained(base, sys.argv[1]), "task 0", sys.argv[2])
"""
MANY = """
import sys
from hyperadapt import LoraGenerator
generator = LoraGenerator.from_pretrained(sys.argv[1])
generator.save_all(sys.argv[2], generator.tasks[:int(sys.argv[3])])
"""


def save_adapter(name: str, folder: Path, tasks: int) -> None:
    """Write an adapter with a model's shapes and random weights; no memory is taken for the model.

    Args:
        name: One of ``SHAPES``.
        folder: Folder to write to; made if missing.
        tasks: Number of tasks.
    """
    config = HyperAdapterConfig(
        r=RANK[name], target_modules="all-linear", tasks=[f"task {index}" for index in range(tasks)], init_weights=False
    )
    with torch.device("meta"):
        base = AutoModel.from_config(SHAPES[name])
        made = find_tuner(get_peft_model(base, config, low_cpu_mem_usage=True)).router.network("default")
    torch.manual_seed(0)
    network = HyperAdapterNetwork(made.config, made.positions, torch.ones(len(made.positions)))
    folder.mkdir(parents=True, exist_ok=True)
    made.config.save_pretrained(str(folder))
    tensors = {f"base_model.hyperadapter_networks.{key}": value for key, value in network.state_dict().items()}
    save_file(tensors, folder / "adapter_model.safetensors")


class Usage(NamedTuple):
    """What a process took; its peak memory is 0 where Linux does not tell it."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def process(command: Sequence[str]) -> Usage:
    """Run a Python process.

    Args:
        command: Its arguments.

    Returns:
        What it took from its start to its end.

    Raises:
        RuntimeError: If it fails.
    """
    started, peak = time.perf_counter(), 0.0
    running = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        # Not the peak of its resource usage, which begins with that of this process. While it ends, there is no such
        # line.
        with suppress(OSError):
            lines = Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8")
            peak = max([peak, *(int(size) * 1024 / MB for size in re.findall(r"VmHWM:\s+(\d+) kB", lines))])
        ended, status, usage = os.wait4(running.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise RuntimeError(f"python {' '.join(command)} ended with {running.returncode}.")
    return Usage(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak)


class Clock:
    """Seconds since it was made, of the clock and of this process's threads on the processor."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Read it.

        Returns:
            Seconds, and CPU seconds.
        """
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def cold(names: Sequence[str], root: Path, turns: int) -> list[Row]:
    """Whole processes that export a task, and one that imports PEFT alone, taking turns.

    Args:
        names: Of ``SHAPES``; their adapters are in folders of these names.
        root: Folder of those.
        turns: Number of turns.

    Returns:
        A row for each process: the medians of its seconds, the largest of its peaks.
    """
    commands = {("", "import peft"): ["-c", "import peft"]}
    for name in names:
        folder, out = str(root / name), str(root / f"{name}-out")
        commands[name, "export"] = ["-m", "hyperadapt", "export", folder, out, "--task", "task 0"]
        if (root / name / "base").exists():
            commands[name, "export with the base model"] = ["-c", WITH_BASE, folder, out]
    runs = [{key: process(command) for key, command in commands.items()} for _ in range(turns)]
    return [
        {
            "measure": "cold",
            "shapes": name,
            "process": what,
            "seconds": statistics.median(run[name, what].seconds for run in runs),
            "cpu_seconds": statistics.median(run[name, what].cpu_seconds for run in runs),
            "peak_mb": max(run[name, what].peak_mb for run in runs),
        }
        for name, what in commands
    ]


def warm(name: str, root: Path, repeats: int) -> Row:
    """One more task in memory.

    Args:
        name: Of ``SHAPES``.
        root: Folder of its adapter's folder.
        repeats: Number of tasks that are made.

    Returns:
        A row with medians of the seconds, the least, and the LoRA's size.
    """
    generator = LoraGenerator.from_pretrained(root / name)
    seconds: list[tuple[float, float]] = []
    size = 0.0
    for index in range(repeats + 1):
        clock = Clock()
        state = generator.state_dict(f"task {index % len(generator.tasks)}")
        seconds.append(clock.read())
        size = sum(tensor.nbytes for tensor in state.values()) / MB
    # The first call makes what the others find made.
    clocks, processors = zip(*seconds[1:], strict=True)
    row = {"measure": "warm", "shapes": name, "seconds": statistics.median(clocks), "least_seconds": min(clocks)}
    return row | {"cpu_seconds": statistics.median(processors), "size_mb": size}


def many(name: str, root: Path, tasks: int, turn: int) -> Row:
    """Many tasks to the disk, in turns with safetensors alone.

    Args:
        name: Of ``SHAPES``.
        root: Folder of its adapter's folder.
        tasks: Number of tasks.
        turn: Number of tasks of a turn.

    Returns:
        A row with both rates in tasks per second, and their ratios, by the clock and by the processor.
    """
    generator = LoraGenerator.from_pretrained(root / name)
    seconds: dict[str, list[tuple[float, float]]] = {"save_all": [], "safetensors": []}
    for first in range(0, tasks, turn):
        names = generator.tasks[first : first + turn]
        states = {task: generator.state_dict(task) for task in names}
        with tempfile.TemporaryDirectory(dir=root) as folder:
            clock = Clock()
            for task, state in states.items():
                place = Path(folder, "safetensors", task)
                place.mkdir(parents=True)
                save_file(state, place / "adapter_model.safetensors", metadata={"format": "pt"})
            seconds["safetensors"].append(clock.read())
            clock = Clock()
            generator.save_all(Path(folder, "all"), names)
            seconds["save_all"].append(clock.read())
    totals = {what: [sum(one) for one in zip(*turns, strict=True)] for what, turns in seconds.items()}
    rates = {f"{what}_per_second": tasks / total[0] for what, total in totals.items()}
    ratio, cpu_ratio = (theirs / ours for theirs, ours in zip(totals["safetensors"], totals["save_all"], strict=True))
    return {"measure": "many", "shapes": name, "tasks": tasks, **rates, "ratio": ratio, "cpu_ratio": cpu_ratio}


def memory(name: str, root: Path, counts: Sequence[int]) -> list[Row]:
    """Peak memory and rate of processes that write many tasks.

    Args:
        name: Of ``SHAPES``.
        root: Folder of its adapter's folder.
        counts: How many tasks each of them writes.

    Returns:
        A row for each.
    """
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            usage = process(["-c", MANY, str(root / name), folder, str(count)])
        rows.append({"measure": "memory", "shapes": name, "tasks": count, **usage._asdict()})
    return rows


def main() -> None:
    """Measure, print a line for each row, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="tiny shapes and few tasks, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    logging.disable_progress_bar()
    small, others = ("tiny", []) if options.fast else ("MiniLM", ["Llama-3-8B", "Llama-3-70B"])
    tasks, turn, counts = (6, 3, [6]) if options.fast else (1000, 250, [100, 10_000])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_adapter(small, root / small, max(counts))
        torch.manual_seed(0)
        nn.Module.float(AutoModel.from_config(SHAPES[small])).save_pretrained(root / small / "base")
        for name in others:
            save_adapter(name, root / name, 16)
        rows = cold([small, *others], root, 1 if options.fast else options.turns)
        rows += [warm(name, root, 2 if options.fast else 8) for name in [small, *others[:1]]]
        rows += [many(small, root, tasks, turn), *memory(small, root, counts)]
    for row in rows:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}))
    save_rows(options.output / "generator.jsonl", rows)


if __name__ == "__main__":
    main()
