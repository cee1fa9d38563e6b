"""Speed and memory against the base model, LoRA and PEFT's Poly: `python -m benchmarks.speed`.

All arms have the same base model with random weights, rank 8, all linear layers, and the same tokens. They take turns
in one process; a turn repeats an arm for at least 50 ms, and a ratio is that of two arms in the same turn. The arms:

- base: the base model alone;
- lora: one plain LoRA for all rows;
- lora adapter_names: K LoRAs, the one of each row chosen by name; PEFT has that for inference only;
- poly: PEFT's Poly with 4 skills and K tasks;
- hyperadapt mixed: K tasks, row i of a batch has task i mod K; all factors are generated in each call;
- hyperadapt pinned, merged: one task for all rows, its factors kept between calls, or in the base weights.

What is measured: a training step (forward, backward, and fused AdamW, Trainer's default); its memory; a forward pass;
greedy generation of 16 tokens; the cold start of a task, from its LoRA file in the page cache or from its embedding to
the output of one row; a training step with the default normalisation beside one with `soft_frobenius`. Memory is, on a
GPU, the peak beyond what was allocated before the step; on a CPU, the storages kept for the backward pass without
parameters, which is no peak of the process.

How they run: eager; on a GPU as a CUDA graph ("graph": a whole eager call, with the optimizer, is replayed); compiled;
on a GPU compiled with `mode="reduce-overhead"`, which replays CUDA graphs ("compiled-graph"). If one of the last three
fails, that is printed, the rest is measured, and the exit status is 1. Rows are saved as soon as they are measured.

Settings vary one thing at a time around 16 rows of 64 tokens and 16 tasks on a Qwen with 4 layers, hidden size 256, and
a small vocabulary, since a large one adds time to every arm and hides what adapters cost. 2048 tokens are one row on a
CPU. Bases above 135 million parameters need a GPU.

Then, on the CPU: all adapters of one task generated for Llama-3-8B's shapes at rank 16; what `import hyperadapt` adds
to `import peft` in a new process; building, saving and loading 1,000 and 10,000 tasks.

Portallib, which also batches LoRAs of many tasks, is left out: it needs huggingface_hub below 2 and cannot be installed
beside the pinned versions.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.rows import save_rows
from benchmarks.normalization import graphed
from benchmarks.speed.arms import (
    ARMS,
    COMPILED,
    COMPILED_GRAPH,
    EAGER,
    GPU_MODES,
    GRAPH,
    LORA,
    MODES,
    NORMALIZED,
    Scenario,
    Subject,
    build_base,
    build_subject,
    example_batch,
)
from benchmarks.speed.calls import (
    Call,
    as_step,
    cold_start_call,
    forward_call,
    generation_call,
    loss_call,
    training_call,
)
from benchmarks.speed.measures import (
    adapter_network,
    generation_seconds,
    import_seconds,
    life_cycle_seconds,
    peak_bytes,
    saved_bytes,
    take_turns,
)
from benchmarks.speed.report import Row, make_rows, print_header, print_rows, report

BASIC = ("training", "memory", "forward")
SCENARIOS = (
    Scenario(measures=tuple(ARMS), modes=tuple(MODES)),
    Scenario(tasks=1, measures=(*BASIC, "normalization")),
    Scenario(tasks=4),
    Scenario(batch=64, tasks=64),
    Scenario(batch=64, measures=("training", "memory")),
    Scenario(batch=1, measures=(*BASIC, "generation")),
    Scenario(length=256),
    Scenario(batch=1, length=2048),
    Scenario("minilm"),
    Scenario("smollm2-135m", batch=2, tasks=4),
    Scenario(length=2048, gpu=True),
    Scenario("qwen2.5-0.5b", measures=tuple(ARMS), modes=tuple(MODES), gpu=True),
    Scenario("qwen2.5-0.5b", length=2048, gpu=True),
    Scenario("qwen2.5-0.5b", batch=64, tasks=64, measures=(*BASIC, "generation"), gpu=True),
    Scenario("llama-3-8b", measures=tuple(ARMS), gpu=True),
    Scenario("llama-3-8b", batch=64, tasks=64, measures=("forward",), gpu=True),
)
# Turns of what takes seconds.
IMPORTS = 7
LIVES = 5
FAST = (Scenario(batch=2, length=4, tasks=2, new_tokens=2, measures=tuple(ARMS)),)


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the scenarios to run; nothing else is measured")
    parser.add_argument("--measures", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--fast", action="store_true", help="one tiny scenario, two turns: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the output's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns = 2 if options.fast else options.turns
    scenarios = FAST if options.fast else SCENARIOS
    folder = options.results or options.output
    rows: list[Row] = []
    failed: list[str] = []
    runs: list[Iterator[list[Row]]] = []
    print_header()
    for index, scenario in enumerate(scenarios):
        if (options.only and index not in options.only) or (scenario.gpu and device.type != "cuda"):
            continue
        measures = [measure for measure in scenario.measures if measure in options.measures]
        modes = [mode for mode in scenario.modes if mode in options.modes]
        runs.append(run_scenario(replace(scenario, measures=measures, modes=modes), turns, device, failed))
    if not options.only:
        runs.append(package_rows(turns, options.fast))
    for made in itertools.chain.from_iterable(runs):
        print_rows(made)
        rows += made
        # What is stopped leaves what it has measured.
        save_rows(folder / "speed.jsonl", rows)
    if not runs:
        parser.error(f"--only {options.only}: none of these scenarios runs on a {device.type}")
    if rows:
        report(rows, folder)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_scenario(scenario: Scenario, turns: int, device: torch.device, failed: list[str]) -> Iterator[list[Row]]:
    """Measure one scenario.

    Args:
        scenario: The scenario.
        turns: Number of turns.
        device: The device; without a GPU, modes that need one are left out.
        failed: Is told what failed, of the modes that may.

    Yields:
        The rows of one measure.
    """
    torch.manual_seed(0)
    base = build_base(scenario.base, device)
    setting: Row = {name: getattr(scenario, name) for name in ("base", "batch", "length", "tasks")}
    modes = [mode for mode in scenario.modes if device.type == "cuda" or mode not in GPU_MODES]
    for mode, measure in itertools.product(modes, scenario.measures):
        if measure not in MODES[mode]:
            continue
        subjects = {arm: build_subject(arm, base, scenario) for arm in MODES[mode][measure]}
        try:
            values = measure_arms(scenario, measure, mode, subjects, turns, device)
        except RuntimeError:
            if mode == EAGER:
                raise
            traceback.print_exc()
            failed.append(f"{scenario.base} {measure} {mode}")
            continue
        finally:
            # Models refer to themselves; the next ones need their memory.
            del subjects
            gc.collect()
        unit = "MB" if measure == "memory" else "ms"
        reference = next(iter(NORMALIZED)) if measure == "normalization" else LORA
        yield make_rows(setting | {"measure": measure, "mode": mode}, unit, values, reference)


def measure_arms(
    scenario: Scenario, measure: str, mode: str, subjects: dict[str, Subject], turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure one thing.

    Args:
        scenario: The scenario.
        measure: What to measure, a key of ``ARMS``.
        mode: How it runs, a key of ``MODES``.
        subjects: The arms.
        turns: Number of turns; memory is measured once.
        device: The device.

    Returns:
        Milliseconds, or megabytes of memory, of each turn by arm.
    """
    batch = example_batch(scenario, device)
    if measure == "memory" and device.type == "cuda":
        return {arm: [peak_bytes(training_call(subject, batch)) / 1e6] for arm, subject in subjects.items()}
    if measure == "memory":
        return {arm: [saved_bytes(loss_call(subject, batch), subject.model) / 1e6] for arm, subject in subjects.items()}
    with tempfile.TemporaryDirectory() as folder:

        def make_calls() -> dict[str, Call]:
            return {arm: make_call(scenario, measure, arm, it, batch, Path(folder)) for arm, it in subjects.items()}

        if mode in (COMPILED, COMPILED_GRAPH):
            # Each measure starts anew; one after another they would hit the limit of recompilations.
            torch.compiler.reset()
            # A graph takes what a first call has learned and made: where rows lie, and tables.
            for call in make_calls().values():
                call()
            for subject in subjects.values():
                kind = "reduce-overhead" if mode == COMPILED_GRAPH else "default"
                subject.model = torch.compile(subject.model, fullgraph=True, mode=kind)
        calls = make_calls()
        if mode in (GRAPH, COMPILED_GRAPH):
            wrap = graphed if mode == GRAPH else as_step
            calls = {arm: wrap(call) for arm, call in calls.items()}
        return take_turns(calls, turns, device)


def make_call(
    scenario: Scenario, measure: str, arm: str, subject: Subject, batch: dict[str, Tensor], folder: Path
) -> Call:
    """What is timed.

    Args:
        scenario: The scenario.
        measure: What to measure.
        arm: Name of the arm.
        subject: The arm.
        batch: The batch.
        folder: An existing folder for files.

    Returns:
        The call.
    """
    if measure in ("training", "normalization"):
        return training_call(subject, batch)
    if measure == "forward":
        return forward_call(subject, batch)
    if measure == "generation":
        return generation_call(subject, batch, scenario.new_tokens)
    return cold_start_call(arm, subject, batch, scenario.names, folder)


def package_rows(turns: int, fast: bool) -> Iterator[list[Row]]:
    """Measure what does not depend on a scenario.

    Args:
        turns: Number of turns.
        fast: Whether to take small sizes.

    Yields:
        The rows of one measure.
    """
    base, r = ("Qwen2.5-0.5B", 2) if fast else ("Llama-3-8B", 16)
    seconds = {"hyperadapt": generation_seconds(adapter_network(base, r), turns)}
    yield make_rows({"base": base, "tasks": 1, "measure": "adapters", "mode": "eager"}, "s", seconds, None)
    if not fast:
        seconds = import_seconds("peft", "hyperadapt", IMPORTS)
        yield make_rows({"measure": "import", "mode": "eager"}, "s", seconds, None)
    sizes = (10, 100) if fast else (1_000, 10_000)
    taken = [{size: life_cycle_seconds("qwen-4x256", size) for size in sizes} for _ in range(min(turns, LIVES))]
    for measure in ("build", "save", "load"):
        values = {f"{size} tasks": [turn[size][measure] for turn in taken] for size in sizes}
        setting: Row = {"base": "qwen-4x256", "measure": measure, "mode": "eager"}
        yield make_rows(setting, "s", values, f"{sizes[0]} tasks")


if __name__ == "__main__":
    main()
