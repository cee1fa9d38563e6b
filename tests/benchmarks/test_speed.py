"""The speed benchmark runs all its arms, and its numbers are what they are called; the times here mean nothing."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.common.rows import read_rows
from benchmarks.speed import __main__ as speed
from benchmarks.speed import measures as speed_measures
from benchmarks.speed.arms import (
    ARMS,
    BASES,
    LORA,
    LORA_NAMES,
    MERGED,
    MIXED,
    MODES,
    PINNED,
    RANK,
    Scenario,
    build_base,
    build_subject,
    example_batch,
)
from benchmarks.speed.calls import cold_start_call, forward_call, training_call
from benchmarks.speed.measures import (
    adapter_network,
    import_seconds,
    saved_bytes,
    take_turns,
)
from benchmarks.speed.report import COLORS, TARGETS, make_rows, target_values
from hyperadapt.tuner.active import find_tuner

CPU = torch.device("cpu")
SMALL = Scenario(batch=3, length=5, tasks=2)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's number of threads does not stay behind."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return build_base("qwen-4x256", CPU)


def test_fast_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed_measures, "TURN_MS", 1.0)
    monkeypatch.setattr("sys.argv", ["speed", "--fast", "--output", str(tmp_path)])
    speed.main()
    rows = read_rows(tmp_path / "speed.jsonl")
    cells = [(row["measure"], row["arm"]) for row in rows]
    assert cells == [
        *((measure, arm) for measure, arms in ARMS.items() for arm in arms),
        ("adapters", "hyperadapt"),
        *((measure, arm) for measure in ("build", "save", "load") for arm in ("10 tasks", "100 tasks")),
    ]
    for row in rows:
        assert row.keys() >= {"torch", "device", "threads", "date", "commit", "unit", "mode"}
        assert len(row["turns"]) == (1 if row["measure"] == "memory" else 2)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        if row["arm"] == row["reference"]:
            assert row["ratio_p20"] == row["ratio_p80"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"speed.jsonl", "speed.svg"}
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("qwen-4x256 ", "Qwen2.5-0.5B ")) for line in lines) == len(rows)


def simulate(monkeypatch: pytest.MonkeyPatch, *failing: tuple[str, str]) -> None:
    """One millisecond for every arm, but a failure where measure and mode are so."""

    def measure_arms(_: Scenario, measure: str, mode: str, *rest: Any) -> dict[str, list[float]]:
        if (measure, mode) in failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {arm: [1.0] for arm in MODES[mode][measure]}

    monkeypatch.setattr(speed, "measure_arms", measure_arms)
    for name in ("build_base", "build_subject"):
        monkeypatch.setattr(speed, name, lambda *_: None)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_failure_leaves_what_was_measured(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, ("memory", "eager") if mode == "eager" else ("training", mode))
    arguments = ["--only", "0", "--measures", "training", "memory", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["speed", *arguments])
    # An arm that fails by itself is a fault of the benchmark, which ends.
    error, message = (RuntimeError, "not permitted") if mode == "eager" else (SystemExit, "4x256 training compiled")
    with pytest.raises(error, match=message):
        speed.main()
    measured = dict.fromkeys((row["measure"], row["mode"]) for row in read_rows(tmp_path / "speed.jsonl"))
    assert list(measured) == [("training", "eager"), ("memory", "eager")][: 1 if mode == "eager" else 2]


def test_modes_that_fail_on_a_gpu_are_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(monkeypatch, ("training", "graph"), ("forward", "compiled"))
    failed: list[str] = []
    scenario = replace(speed.SCENARIOS[0], measures=("training", "forward"))
    rows = list(speed.run_scenario(scenario, 1, torch.device("cuda"), failed))
    assert [(made[0]["measure"], made[0]["mode"]) for made in rows] == [
        ("training", "eager"),
        ("forward", "eager"),
        ("forward", "graph"),
        ("training", "compiled"),
        ("training", "compiled-graph"),
        ("forward", "compiled-graph"),
    ]
    assert failed == ["qwen-4x256 training graph", "qwen-4x256 forward compiled"]
    assert capsys.readouterr().err.count("RuntimeError: operation not permitted") == 2


def test_scenarios_cover_what_targets_need() -> None:
    assert {scenario.base for scenario in speed.SCENARIOS} == set(BASES)
    assert {scenario.tasks for scenario in speed.SCENARIOS} == {1, 4, 16, 64}
    assert {scenario.length for scenario in speed.SCENARIOS if not scenario.gpu} == {64, 256, 2048}
    assert set(COLORS) == {arm for arms in ARMS.values() for arm in arms if LORA in arms}
    for mode in MODES.values():
        assert all(set(arms) <= set(ARMS[measure]) for measure, arms in mode.items())
    # Both sizes are measured in every mode.
    assert {scenario.base for scenario in speed.SCENARIOS if set(scenario.modes) == set(MODES)} == {
        "qwen-4x256",
        "qwen2.5-0.5b",
    }
    for target in TARGETS:
        setting = {name: value for name, value in target.setting.items() if name not in ("measure", "mode")}
        if "batch" not in setting:
            continue
        assert setting.keys() == {"base", "batch", "length", "tasks"}
        (scenario,) = (scenario for scenario in speed.SCENARIOS if setting.items() <= vars(scenario).items())
        assert target.setting["measure"] in scenario.measures
        assert not scenario.gpu
        assert {target.arm, target.reference} <= set(ARMS[target.setting["measure"]])


def test_arms_share_the_base_weights_and_compute_the_same_at_the_start(base: nn.Module) -> None:
    batch = example_batch(SMALL, CPU)
    expected = base(**batch).logits
    own = {parameter.data_ptr() for parameter in base.parameters()}
    for arm in ARMS["forward"]:
        subject = build_subject(arm, base, SMALL)
        shared = own & {parameter.data_ptr() for parameter in subject.model.parameters()}
        assert shared == (set() if arm == MERGED else own)
        output: Any = forward_call(subject, batch)()
        assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(hasattr(module, "base_layer") for module in base.modules())


def test_each_row_gets_its_task(base: nn.Module) -> None:
    batch = example_batch(SMALL, CPU)
    mixed, names = build_subject(MIXED, base, SMALL), build_subject(LORA_NAMES, base, SMALL)
    for subject in (mixed, names):
        for name, parameter in subject.model.named_parameters():
            if parameter.requires_grad or "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for subject, alone in ((mixed, {"tasks": ["task1"]}), (names, {"adapter_names": ["task1"]})):
            output: Any = forward_call(subject, batch)()
            second = subject.model(**{key: value[1:2] for key, value in batch.items()}, **alone).logits
            assert_close(output.logits[1:2], second, rtol=1e-4, atol=1e-4)
            assert (output.logits[1] - base(**batch).logits[1]).abs().max() > 0.01
    assert mixed.routing["tasks"].tolist() == [0, 1, 0]
    assert names.routing["adapter_names"] == ["task0", "task1", "task0"]


def test_a_training_step_changes_only_what_trains(base: nn.Module) -> None:
    batch = example_batch(SMALL, CPU)
    before = [parameter.clone() for parameter in base.parameters()]
    for arm in ARMS["training"]:
        subject = build_subject(arm, base, SMALL)
        trained = {name: value for name, value in subject.model.named_parameters() if value.requires_grad}
        start = {name: value.detach().clone() for name, value in trained.items()}
        training_call(subject, batch)()
        assert any(not torch.equal(start[name], value) for name, value in trained.items())
        assert all(value.grad is None for value in trained.values())
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))


def test_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario("minilm", batch=2, length=4, tasks=2, measures=("training",))
    (rows,) = speed.run_scenario(scenario, 1, CPU, [])
    assert [row["arm"] for row in rows] == list(ARMS["training"])


def test_cold_start_uses_another_task_each_time(base: nn.Module, tmp_path: Path) -> None:
    batch = example_batch(SMALL, CPU)
    pinned = build_subject(PINNED, base, SMALL)
    call = cold_start_call(PINNED, pinned, batch, SMALL.names, tmp_path)
    tuner = find_tuner(pinned.model)
    seen = []
    for _ in range(2):
        output: Any = call()
        assert output.logits.shape[:2] == (1, SMALL.length)
        seen.append(tuner.router.pinned["default"])
    assert sorted(seen) == SMALL.names
    lora = build_subject(LORA, base, SMALL)
    call = cold_start_call(LORA, lora, batch, SMALL.names, tmp_path)
    weights = [value for value in lora.model.parameters() if value.requires_grad]
    saved = [value.detach().clone() for value in weights]
    for value in weights:
        nn.init.ones_(value)
    call()
    # Read from the file.
    assert all(torch.equal(old, new) for old, new in zip(saved, weights, strict=True))


def test_turns_are_interleaved_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def arm(name: str, seconds: float) -> Any:
        def call() -> None:
            clock[0] += seconds
            order.append(name)

        return call

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    times = take_turns({"slow": arm("slow", 0.02), "fast": arm("fast", 0.012)}, 3, CPU)
    assert times == {"slow": pytest.approx([20] * 3), "fast": pytest.approx([12] * 3)}
    # At least 50 ms for each; every second turn backwards.
    slow, fast = ["slow"] * 3, ["fast"] * 5
    assert order[4:] == [*slow, *fast, *fast, *slow, *slow, *fast]


def test_saved_bytes_are_those_of_distinct_storages() -> None:
    linear = nn.Linear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)

    nodes = []

    def loss() -> Tensor:
        hidden = linear(x)
        # Its own input twice, and once more as a view.
        output = (hidden * hidden.T.T).exp()
        output.grad_fn.metadata["marker"] = marker = nn.Identity()
        nodes.append(weakref.ref(marker))
        return output.sum()

    # x for the weight's gradient, hidden, and the result of exp; the weight itself is a parameter.
    assert saved_bytes(loss, linear) == 4 * (5 * 6 + 5 * 4 + 5 * 4)
    # The graph is freed.
    gc.collect()
    assert nodes[0]() is None


def test_import_seconds_are_those_of_each_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick.py").write_text("")
    (tmp_path / "slow.py").write_text("import time, quick\ntime.sleep(0.3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    times = import_seconds("quick", "slow", 2)
    assert all(seconds < 0.3 for seconds in times["quick"])
    assert all(seconds >= 0.3 for seconds in times["slow"])


def test_adapter_network_has_the_shapes_of_the_base() -> None:
    network = adapter_network("Qwen2.5-0.5B", 2)
    factors = network(torch.tensor([0]))
    assert len(factors) == 24 * 7
    lora_A, lora_B, _ = next(value for name, value in factors.items() if name.endswith("0.mlp.down_proj"))
    assert lora_A.shape == (1, 2, 4864)
    assert lora_B.shape == (1, 896, 2)


def test_ratios_are_taken_within_turns() -> None:
    setting = {"base": "qwen-4x256", "batch": 16, "length": 64, "tasks": 16, "measure": "training", "mode": "eager"}
    lora, mixed = [1.0, 2.0, 4.0, 3.0, 1.0], [1.5, 2.0, 8.0, 3.3, 1.2]
    rows = make_rows(setting, "ms", {LORA: lora, MIXED: mixed}, LORA)
    ratios = np.sort([1.5, 1.0, 2.0, 1.1, 1.2])
    expected = [ratios[0] + 0.8 * (ratios[1] - ratios[0]), ratios[2], ratios[3] + 0.2 * (ratios[4] - ratios[3])]
    assert [rows[1][name] for name in ("ratio_p20", "ratio_p50", "ratio_p80")] == pytest.approx(expected)
    assert rows[1]["p50"] == 2.0
    values = {target.text: target_values(target, rows) for target in TARGETS}
    assert values.pop("training step, 16 tasks in a batch, over one LoRA") == pytest.approx(expected)
    assert set(values.values()) == {None}
    assert RANK == 8
