"""Ready trainers: one task is trained as TRL trains it pinned, and a mixed batch as its tasks' rows."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import TrainingArguments

from tests.support.helpers import TASKS, adapted_model, adapter_parameters, base_model
from tests.support.tolerances import FLOAT32_TRAINED
from tests.support.trl_runs import WORDS, policy, settings, tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed")

from hyperadapt import trl as ours  # noqa: E402
from hyperadapt.trainer import TaskSampler, concatenate_tasks  # noqa: E402

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

COLOURS = WORDS[-3:]
KINDS = ("SFT", "Reward", "DPO", "KTO", "GRPO")
ROWS = 6


def text_rows(kind: str, task: str, count: int = ROWS) -> Dataset:
    """Rows that differ, of one task."""

    def row(index: int) -> dict[str, Any]:
        good, bad = COLOURS[index % 3], COLOURS[(index + 1) % 3]
        prompt = f"{task} which " + " ".join(COLOURS[: index % 3])
        return {
            "SFT": {"prompt": prompt, "completion": f" {good} {bad}"},
            "KTO": {"prompt": prompt, "completion": f" {good} {bad}", "label": index % 2 == 0},
            "GRPO": {"prompt": prompt},
        }.get(kind, {"prompt": prompt, "chosen": f" {good} {good}", "rejected": f" {bad}"})

    return Dataset.from_list([row(index) for index in range(count)])


def as_chats(rows: Dataset) -> Dataset:
    """The same as lists of messages."""

    def written(row: dict[str, Any]) -> dict[str, Any]:
        role = {"prompt": "user"}
        return {
            name: [{"role": role.get(name, "assistant"), "content": value}] if isinstance(value, str) else value
            for name, value in row.items()
        }

    return Dataset.from_list([written(row) for row in rows])


def all_rows(kind: str) -> dict[str, Dataset]:
    """Three, two and one rows of the three tasks, of which the second has chats."""
    rows = {task: text_rows(kind, task, 3 - index) for index, task in enumerate(TASKS)}
    return rows | {"beta": as_chats(rows["beta"])}


def closeness(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Rewards that differ within a group."""
    return [sum(ids) / 100 for ids in completion_ids]


def options(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer, but for the model and its data."""
    own: dict[str, Any] = {"learning_rate": 2e-3, "max_steps": 3, "lr_scheduler_type": "constant"}
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    more: dict[str, Any] = {"processing_class": words}
    if kind == "GRPO":
        own |= {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4}
        more["reward_funcs"] = closeness
    return more | {"args": settings(getattr(trl, f"{kind}Config"), folder, **own | changes)}


def model_for(kind: str) -> PeftModel:
    return policy("SEQ_CLS" if kind == "Reward" else "CAUSAL_LM")


def train(kind: str, folder: Path, data: Any, model: PeftModel | None = None, **changes: Any) -> Any:
    model = model or model_for(kind)
    trainer = getattr(ours, f"MultiTask{kind}Trainer")(model, train_dataset=data, **options(kind, folder, **changes))
    trainer.train()
    return trainer


def train_pinned(kind: str, folder: Path, task: str, data: Dataset, **changes: Any) -> Any:
    """TRL's own trainer, on rows in the order given."""
    model = model_for(kind)
    model.set_task(task)
    if kind == "GRPO":
        changes["shuffle_dataset"] = False
    trainer = getattr(trl, f"{kind}Trainer")(model, train_dataset=data, **options(kind, folder, **changes))
    trainer.train()
    return trainer


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def learned(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in adapter_parameters(trainer.model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_is_trained_as_trl_trains_it_pinned(kind: str, tmp_path: Path) -> None:
    data = text_rows(kind, "beta")
    one = train(kind, tmp_path, {"beta": data})
    # Where the order counts, within an epoch or a batch, it is this one.
    order = list(TaskSampler([1] * ROWS, ROWS, seed=42))
    other = train_pinned(kind, tmp_path, "beta", data.select(order))
    for ours_logged, theirs in zip(logs_of(one), logs_of(other), strict=True):
        shared = (ours_logged.keys() & theirs.keys()) - {"step_time"}
        assert {"loss", "grad_norm"} <= shared
        for name in shared:
            assert_close(ours_logged[name], theirs[name], rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED, equal_nan=True)
    expected, start = learned(other), adapter_parameters(model_for(kind))
    for name, value in learned(one).items():
        assert_close(value, expected[name], rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in expected.items())


# Weights of tasks in the loss: by tokens, or by rows.
@pytest.mark.parametrize("kind", ["SFT", "Reward", "DPO", "KTO"])
def test_a_mixed_batch_of_texts_and_chats_is_trained_as_its_rows(kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
    if kind == "KTO":
        # Its other loss compares with a mean over the batch.
        changes["loss_type"] = "apo_zero_unpaired"
    data = all_rows(kind)
    mixed = train(kind, tmp_path, data, **changes)
    start = {name: value.detach() for name, value in adapter_parameters(model_for(kind)).items()}
    expected, total = {name: torch.zeros_like(value) for name, value in start.items()}, 0.0
    for task, rows in data.items():
        alone = train_pinned(kind, tmp_path, task, rows, **changes)
        weight = (
            sum(sum(label != -100 for label in row["labels"]) for row in alone.train_dataset) if kind == "SFT" else 0
        )
        weight = weight or len(rows)
        for name, value in learned(alone).items():
            expected[name] += weight * (value - start[name])
        total += weight
        [by_task], [theirs] = logs_of(mixed), logs_of(alone)
        for name in theirs.keys() - {"grad_norm", "learning_rate", "num_tokens", "epoch", "step", "kl"}:
            assert_close(by_task[f"{name}_{task}"], theirs[name], rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)
    for name, value in learned(mixed).items():
        assert_close(value, start[name] + expected[name] / total, rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)
    assert any(step.abs().max() > 1e-2 for step in expected.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_a_whole_one(kind: str, tmp_path: Path) -> None:
    # GRPO stops between two generations: each is used for two steps.
    changes: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    if kind == "GRPO":
        changes |= {"steps_per_generation": 2, "per_device_train_batch_size": 4}
    else:
        changes |= {"per_device_train_batch_size": 2}
    whole = train(kind, tmp_path, all_rows(kind), **changes)
    trainer = getattr(ours, f"MultiTask{kind}Trainer")(
        model_for(kind), train_dataset=all_rows(kind), **options(kind, tmp_path / "resumed", **changes)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = learned(whole)
    assert all(torch.equal(value, expected[name]) for name, value in learned(trainer).items())
    assert [entry["loss"] for entry in logs_of(trainer)] == [entry["loss"] for entry in logs_of(whole)]


def test_the_reference_is_the_start_without_another_base(tmp_path: Path) -> None:
    model = model_for("DPO")
    base = {name for name, _ in model.named_parameters() if "hyperadapter_" not in name}
    trainer = train("DPO", tmp_path, all_rows("DPO"), model, save_strategy="steps", save_steps=3)
    assert trainer.ref_model is None
    assert {name for name, _ in model.named_parameters() if "hyperadapter_" not in name} == base
    first, *_, last = logs_of(trainer)
    assert_close(first["loss"], math.log(2), rtol=FLOAT32_TRAINED, atol=0)
    assert last["loss"] < first["loss"]
    # What is saved is the policy.
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    name, value = next(iter(learned(trainer).items()))
    assert torch.equal(saved[name.replace(".default", "")], value)


def test_a_task_trains_alone_beside_its_reference(tmp_path: Path) -> None:
    model = model_for("DPO")
    model.add_own_factors("beta")
    model.set_trained_task("beta")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train("DPO", tmp_path, {"beta": text_rows("DPO", "beta")}, model, precompute_ref_log_probs=True).model
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before.get(name, value))}
    assert changed
    assert all(".own_factors." in name for name in changed)


@pytest.mark.parametrize("kind", ["Reward", "DPO", "GRPO"])
def test_evaluation_tells_metrics_of_each_task(kind: str, tmp_path: Path) -> None:
    data = all_rows(kind)
    given = options(kind, tmp_path)
    trainer = getattr(ours, f"MultiTask{kind}Trainer")(model_for(kind), train_dataset=data, eval_dataset=data, **given)
    metrics = trainer.evaluate()
    name = {"Reward": "margin", "DPO": "logps/chosen", "GRPO": "reward"}[kind]
    values = [metrics[f"eval_{task}_{name}"] for task in TASKS]
    assert len(set(values)) == 3
    assert_close(metrics[f"eval_mean_{name}"], sum(values) / 3)
    assert f"eval_{name}" not in metrics


def test_packing_joins_rows_of_one_task(tmp_path: Path) -> None:
    data = {task: text_rows("SFT", task) for task in TASKS}
    trainer = train("SFT", tmp_path, data, packing=True, packing_strategy="wrapped", max_length=16)
    for row in trainer.train_dataset:
        assert {WORDS[token] for token in row["input_ids"]} & set(TASKS) <= {TASKS[row["tasks"]]}
    assert len(trainer.train_dataset) < 3 * ROWS


def test_rows_without_prompts_beside_completions(tmp_path: Path) -> None:
    data = {"alpha": Dataset.from_list([{"text": "alpha red blue"}] * 2), "beta": text_rows("SFT", "beta", 2)}
    trainer = train("SFT", tmp_path, data)
    by_task = {TASKS[row["tasks"]]: row for row in trainer.train_dataset}
    assert by_task["alpha"]["labels"] == by_task["alpha"]["input_ids"]
    assert by_task["beta"]["labels"][:2] == [-100, -100]


def seen_by(task: str, seen: dict[str, list[Any]]) -> Any:
    def reward(prompts: list[Any], completion_ids: list[Any], log_extra: Any, **columns: Any) -> list[float]:
        seen.setdefault(task, []).extend(prompts)
        log_extra("length", [len(ids) for ids in completion_ids])
        return [float(len(task))] * len(prompts)

    return reward


def test_rewards_of_each_task_get_its_rows_alone(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}

    async def later(prompts: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(prompts)

    rewards = {task: [seen_by(task, seen), later] if task == "beta" else seen_by(task, seen) for task in TASKS}
    data = all_rows("GRPO")
    given = options("GRPO", tmp_path, max_steps=2, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    trainer = ours.MultiTaskGRPOTrainer(model_for("GRPO"), **given | {"reward_funcs": rewards}, train_dataset=data)
    trainer.train()
    assert set(seen) == set(TASKS)
    for task, prompts in seen.items():
        # Texts and chats come as what they are.
        texts = [prompt if task != "beta" else prompt[0]["content"] for prompt in prompts]
        assert texts
        assert all(text.startswith(task) for text in texts)
    logged = logs_of(trainer)
    assert {entry.get(f"reward_{task}") for entry in logged for task in ("alpha", "gamma")} <= {5.0, None}
    assert {entry.get("reward_beta") for entry in logged} <= {5.0, None}
    assert any("rewards/beta/later/mean" in entry for entry in logged)
    assert None in trainer._logs["extra"]["length"] or len(seen) == 3


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "arguments of another trainer": (
        "DPO",
        {"args": TrainingArguments("run", use_cpu=True)},
        TypeError,
        "args is of type TrainingArguments, but MultiTaskDPOTrainer takes a DPOConfig",
    ),
    "a task that is not known": (
        "SFT",
        {"train_dataset": {"delta": text_rows("SFT", "alpha")}},
        ValueError,
        "Unknown task 'delta'. Known tasks: .*alpha",
    ),
    "no adapter": ("SFT", {"model": base_model("llama")}, TypeError, "LlamaForCausalLM has no hyperadapter"),
    "rewards of a task that is not known": (
        "GRPO",
        {"reward_funcs": {"delta": closeness}},
        ValueError,
        "reward_funcs has the unknown task 'delta'",
    ),
    "a task without rewards": (
        "GRPO",
        {"reward_funcs": {"alpha": closeness, "beta": []}},
        ValueError,
        r"reward_funcs has no function for \['beta', 'gamma'\], of which there are rows",
    ),
    "a reward model for one task": (
        "GRPO",
        {"reward_funcs": dict.fromkeys(TASKS, torch.nn.Linear(1, 1))},
        TypeError,
        r"reward_funcs\['alpha'\] holds Linear.*A reward model scores the rows of all tasks",
    ),
    "a reward model for texts and chats": (
        "GRPO",
        {"reward_funcs": ["me/reward"]},
        ValueError,
        "The reward model 'me/reward' cannot score a batch of texts and chats",
    ),
    "a task without rewards in one data set": (
        "GRPO",
        {
            "reward_funcs": {"alpha": closeness},
            "train_dataset": concatenate_tasks({"beta": text_rows("GRPO", "x")}, TASKS),
        },
        ValueError,
        r"reward_funcs has no function for \['beta'\], of which there are rows",
    ),
    "tools for texts": ("GRPO", {"tools": [print]}, ValueError, "tools and environments need chats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    kind, changes, error, message = REFUSED[case]
    given = {"model": model_for(kind), "train_dataset": all_rows(kind), **options(kind, tmp_path), **changes}
    with pytest.raises(error, match=message):
        getattr(ours, f"MultiTask{kind}Trainer")(**given)


def test_rewards_of_another_number_are_refused(tmp_path: Path) -> None:
    given = options("GRPO", tmp_path) | {"reward_funcs": {task: lambda **columns: [1.0] for task in TASKS}}
    trainer = ours.MultiTaskGRPOTrainer(model_for("GRPO"), **given, train_dataset=all_rows("GRPO"))
    with pytest.raises(ValueError, match=r"The reward function '\w+/<lambda>' gave 1 rewards for [24] completions"):
        trainer.train()


def test_each_task_learns_what_it_is_rewarded_for(tmp_path: Path) -> None:
    # No two of the tasks can be learned by one answer.
    wanted = {"alpha": range(50), "beta": range(50, 100), "gamma": range(0, 100, 2)}

    def rewarded(tokens: range) -> Any:
        return lambda completion_ids, **columns: [
            sum(one in tokens for one in ids) / len(ids) for ids in completion_ids
        ]

    changes = {"max_steps": 40, "learning_rate": 5e-2, "per_device_train_batch_size": 24, "num_generations": 4}
    given = options("GRPO", tmp_path, **changes, beta=0.0)
    given["reward_funcs"] = {task: rewarded(tokens) for task, tokens in wanted.items()}
    data = {task: text_rows("GRPO", task) for task in TASKS}
    start = adapted_model("llama", active=False, task_type="CAUSAL_LM")
    trainer = ours.MultiTaskGRPOTrainer(start, **given, train_dataset=data)
    trainer.train()
    for task in TASKS:
        rewards = [entry[f"reward_{task}"] for entry in logs_of(trainer) if f"reward_{task}" in entry]
        assert rewards[0] < 0.55
        assert sum(rewards[-10:]) / 10 > 0.7


def test_losses_of_tasks_are_parts_of_the_whole(tmp_path: Path) -> None:
    data = {task: text_rows("GRPO", task, 1) for task in TASKS}
    # In the second step on the same completions, policy and reference differ.
    changes = {"per_device_train_batch_size": 6, "num_iterations": 2, "max_steps": 2, "learning_rate": 2e-2}
    first, second = logs_of(train("GRPO", tmp_path, data, **changes))
    lengths = {task: first[f"completions/mean_length_{task}"] for task in TASKS}
    assert_close(sum(first[f"reward_{task}"] for task in TASKS) / 3, first["reward"])
    parts = {task: second[f"loss_{task}"] * lengths[task] / sum(lengths.values()) for task in TASKS}
    assert min(map(abs, parts.values())) > 1e-3
    assert_close(sum(parts.values()), second["loss"], rtol=FLOAT32_TRAINED, atol=FLOAT32_TRAINED)


def test_a_task_whose_rows_are_all_too_long_is_refused(tmp_path: Path) -> None:
    data = {
        "alpha": text_rows("DPO", "alpha"),
        "beta": Dataset.from_list([{"prompt": "beta " + "which " * 20, "chosen": " red", "rejected": " blue"}]),
    }
    with pytest.raises(ValueError, match=r"None of the 1 rows of task 'beta' is left.*max_length=16"):
        train("DPO", tmp_path, data, max_length=16)


def test_without_trl_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hyperadapt.trl")
    with pytest.raises(
        ImportError, match=r"hyperadapt\.trl needs TRL, which could not.*pip install 'hyperadapt\[trl\]'"
    ):
        importlib.import_module("hyperadapt.trl")


def test_a_data_set_of_all_tasks(tmp_path: Path) -> None:
    data = {task: text_rows("KTO", task, 4) for task in TASKS}
    one = train("KTO", tmp_path, data)
    other = train("KTO", tmp_path, concatenate_tasks(data, TASKS))
    expected = learned(other)
    assert all(torch.equal(value, expected[name]) for name, value in learned(one).items())
