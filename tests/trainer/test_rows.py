"""Trainers that arrange rows in ways of their own: every call of a model gives each row its own task."""

import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close
from transformers import TrainingArguments

from hyperadapt.trainer import HyperAdapterTrainer, concatenate_tasks
from tests.support.helpers import TASKS, adapted_model, base_model
from tests.support.tolerances import FLOAT32_FORWARD
from tests.support.trl_runs import WORDS, multi, policy, rows, settings, tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed")

with warnings.catch_warnings():
    # That these may change.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# TRL 1.16 uses names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


class Calls:
    """What a model was called with, and gave."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.seen: list[tuple[str, bool, dict[str, Any], Any]] = []
        self._layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        inputs = dict(kwargs) | dict(zip(["input_ids"], args, strict=False))
        # What is no batch is a method of the model that a trainer sends through its wrapper.
        if isinstance(inputs["input_ids"], torch.Tensor):
            self.seen.append((model.active_adapter, self._layer.disable_adapters, inputs, outputs))

    @torch.no_grad()
    def check(self) -> int:
        """Run each row of each call alone, with the task that its prompt tells; how many calls had several tasks."""
        self._handle.remove()
        self.model.eval()
        return sum(self._is_mixed(*call) for call in self.seen)

    def _is_mixed(self, adapter: str, is_disabled: bool, inputs: dict[str, Any], outputs: Any) -> bool:
        self.model.set_adapter(adapter)
        tasks = [next(WORDS[token] for token in row if WORDS[token] in TASKS) for row in inputs["input_ids"]]
        inputs = {name: value for name, value in inputs.items() if name not in ("tasks", "past_key_values")}
        for index, task in enumerate(tasks):
            alone = {
                name: value[index : index + 1] if isinstance(value, torch.Tensor) and value.ndim else value
                for name, value in inputs.items()
            }
            with self.model.disable_adapter() if is_disabled else nullcontext():
                expected = self.model(**alone, tasks=task)
            name = "log_probs" if "log_probs" in outputs else "logits"
            assert_close(outputs[name][index], expected[name][0], rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
        return len(set(tasks)) > 1 and not is_disabled


PREFERENCES = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "pairs", {}),
    "dpo, reference computed before": (trl.DPOTrainer, trl.DPOConfig, "pairs", {"precompute_ref_log_probs": True}),
    "dpo, accumulated": (
        trl.DPOTrainer,
        trl.DPOConfig,
        "pairs",
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    ),
    "reward": (trl.RewardTrainer, trl.RewardConfig, "pairs", {}),
    "cpo": (CPOTrainer, CPOConfig, "pairs", {"max_length": 16}),
    "orpo": (ORPOTrainer, ORPOConfig, "pairs", {"max_length": 16}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, "marked", {}),
    "kto, reference computed before": (
        trl.KTOTrainer,
        trl.KTOConfig,
        "marked",
        {"precompute_ref_log_probs": True},
    ),
    "sft": (trl.SFTTrainer, trl.SFTConfig, "completions", {}),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_each_row_has_its_task(name: str, tmp_path: Path) -> None:
    kind, options, data, changes = PREFERENCES[name]
    model = policy("SEQ_CLS" if name == "reward" else "CAUSAL_LM")
    calls = Calls(model)
    trainer = multi(kind)(
        model,
        settings(options, tmp_path, **changes),
        train_dataset=rows(data),
        # Two of TRL's trainers do not take a dict here.
        eval_dataset=concatenate_tasks(rows(data, 2), TASKS) if name in ("cpo", "orpo") else rows(data, 2),
        processing_class=tokenizer(),
    )
    trainer.train()
    trained = len(calls.seen)
    metrics = trainer.evaluate()
    assert metrics["eval_loss" if name in ("cpo", "orpo") else "eval_mean_loss"] > 0
    assert len(calls.seen) > trained > 0
    assert calls.check() > 0


def test_a_reference_model_of_its_own(tmp_path: Path) -> None:
    trainer = multi(trl.DPOTrainer)(
        policy(),
        settings(trl.DPOConfig, tmp_path),
        train_dataset=rows("pairs"),
        ref_model=base_model("llama"),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert trainer.state.log_history[0]["rewards/chosen"] != 0


def reward(completions: list[str], tasks: list[int], **kwargs: Any) -> list[float]:
    return [float(len(text)) + task for text, task in zip(completions, tasks, strict=True)]


def record_generation(model: PeftModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generate, seen = model.generate, []

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = generate(*args, **kwargs)
        seen.append((kwargs["input_ids"], output))
        return output

    model.generate = recording
    return seen


ONLINE = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.1, "num_generations": 2}),
    "grpo, used twice": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.1, "num_generations": 2, "num_iterations": 2}),
    "grpo, accumulated": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"num_generations": 2, "gradient_accumulation_steps": 2},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"num_generations": 2}),
    "distillation": (trl.DistillationTrainer, trl.DistillationConfig, {}),
    "distillation of an adapter": (trl.DistillationTrainer, trl.DistillationConfig, {}),
}


def online(name: str, model: PeftModel, folder: Path, changes: dict[str, Any], **options: Any) -> Any:
    kind, config, more = ONLINE[name]
    # Its tasks are in another order.
    teacher = adapted_model("llama", tasks=TASKS[::-1]) if name.endswith("adapter") else base_model("llama")
    compared = {"teacher_model": teacher} if name.startswith("distillation") else {"reward_funcs": reward}
    return multi(kind)(
        model,
        settings(config, folder, max_completion_length=4, top_k=1, **more | changes),
        train_dataset=rows("prompts"),
        eval_dataset=rows("prompts", 2),
        processing_class=tokenizer(),
        **compared | options,
    )


@pytest.mark.parametrize("name", ONLINE)
def test_each_row_is_generated_and_trained_with_its_task(name: str, tmp_path: Path) -> None:
    model = policy()
    calls, generated = Calls(model), record_generation(model)
    trainer = online(name, model, tmp_path, {})
    trainer.train()
    trainer.evaluate()
    assert calls.check() > 0 or name.startswith("distillation")
    assert generated
    for prompts, outputs in list(generated):
        tasks = [next(WORDS[token] for token in prompt if WORDS[token] in TASKS) for prompt in prompts]
        length = outputs.shape[1] - prompts.shape[1]
        again = model.generate(input_ids=prompts, tasks=tasks, do_sample=False, max_new_tokens=length)
        assert torch.equal(again, outputs[:, : again.shape[1]])


@pytest.mark.parametrize("limit", [None, 1])
def test_rows_in_parts_keep_their_tasks(limit: int | None, tmp_path: Path) -> None:
    model = policy()
    calls = Calls(model)
    # The reference is computed for a part of what was generated at a time.
    changes = {"beta": 0.1, "per_device_train_batch_size": 6}
    online("grpo, accumulated", model, tmp_path, changes, max_tasks_per_batch=limit).train()
    assert (calls.check() > 0) == (limit is None)
    assert calls.seen


def test_losses_of_one_task_where_there_are_no_labels(tmp_path: Path) -> None:
    trainer = multi(trl.DPOTrainer)(
        policy(),
        settings(trl.DPOConfig, tmp_path, max_steps=3, learning_rate=1e-2),
        train_dataset=rows("pairs"),
        processing_class=tokenizer(),
        max_tasks_per_batch=1,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    by_task = [{key: value for key, value in entry.items() if key.startswith("loss_")} for entry in logs]
    for entry, [value] in zip(logs, (one.values() for one in by_task), strict=True):
        assert_close(value, entry["loss"], rtol=FLOAT32_FORWARD, atol=0)


@pytest.mark.filterwarnings("ignore:No task was given, so all rows use the default task 'beta'")
def test_the_same_steps_as_of_one_task_without_the_mixin(tmp_path: Path) -> None:
    ends = []
    for kind in (multi(trl.DPOTrainer), trl.DPOTrainer):
        model = policy()
        data = rows("pairs")["beta"]
        is_ours = kind is not trl.DPOTrainer
        if not is_ours:
            model.set_task("beta")
            # TRL copies the adapter as reference, for which the mixin sets the task.
            model.peft_config["default"].default_task = "beta"
        arguments = settings(trl.DPOConfig, tmp_path, learning_rate=1e-2, per_device_train_batch_size=5)
        rows_of_beta = {"beta": data} if is_ours else data
        trainer = kind(model, args=arguments, train_dataset=rows_of_beta, processing_class=tokenizer())
        trainer.train()
        ends.append({name: value for name, value in model.named_parameters() if ".default." in name})
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert_close(value, ends[1][name], rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


class Doubling:
    """Stands for a collator of unknown kind: each row twice in a row."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"] for row in rows for _ in range(2)])
        return {"input_ids": ids, "labels": ids}


def test_unknown_arrangements_are_refused(tmp_path: Path) -> None:
    data = {task: Dataset.from_dict({"input_ids": [[3 + index, 6, 7]] * 4}) for index, task in enumerate(TASKS)}
    arguments = settings(TrainingArguments, tmp_path, gradient_checkpointing=False)
    message = r"Got tasks for 6 rows, but the batch has 12: how HyperAdapterTrainer arranges rows.*blocks=2"
    trainer = HyperAdapterTrainer(policy(), arguments, Doubling(), data)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    # One task has any arrangement.
    HyperAdapterTrainer(policy(), arguments, Doubling(), data, max_tasks_per_batch=1).train()


@pytest.mark.parametrize(
    ("kind", "options", "changes", "message"),
    [
        (
            trl.GRPOTrainer,
            trl.GRPOConfig,
            {"use_vllm": True, "num_generations": 2},
            "use_vllm=True cannot be followed: vLLM is given weights",
        ),
        (
            trl.GRPOTrainer,
            trl.GRPOConfig,
            {"use_transformers_continuous_batching": True, "num_generations": 2},
            "use_transformers_continuous_batching=True cannot be followed: rows are taken apart",
        ),
        (CPOTrainer, CPOConfig, {"generate_during_eval": True}, "generate_during_eval=True cannot be followed"),
        (
            trl.SFTTrainer,
            trl.SFTConfig,
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy='sequential' cannot be followed",
        ),
    ],
)
def test_what_loses_tasks_is_refused(
    kind: type, options: type, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        multi(kind)(policy(), settings(options, tmp_path, **changes), train_dataset=rows("pairs"))
