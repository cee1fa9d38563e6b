"""Which task a pin names for adapters that were not pinned themselves, such as TRL's reference."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hyperadapt import use_tasks
from tests.support.helpers import (
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    example_batch,
    logits,
    make_active,
)

BATCH = example_batch("llama", labels=False)


def policy(**changes: Any) -> PeftModel:
    return adapted_model("llama", task_type="CAUSAL_LM", **changes)


def add_reference(model: PeftModel) -> PeftModel:
    """As TRL's DPO, KTO, GRPO and RLOO trainers do for an adapter that is trained already."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def with_adapter(model: PeftModel, adapter_name: str, **routing: Any) -> Tensor:
    previous = model.active_adapter
    model.set_adapter(adapter_name)
    try:
        return logits(model, BATCH, **routing)
    finally:
        model.set_adapter(previous)


@pytest.mark.parametrize("default_task", [None, "gamma"])
def test_a_copy_follows_the_pin(default_task: str | None) -> None:
    model = policy(default_task=default_task)
    expected = {task: logits(model, BATCH, tasks=task) for task in TASKS}
    model.set_task("beta")
    add_reference(model)
    assert torch.equal(with_adapter(model, "ref"), expected["beta"])
    model.set_task("alpha")
    assert torch.equal(with_adapter(model, "ref"), expected["alpha"])
    with use_tasks(model, "gamma"):
        assert torch.equal(with_adapter(model, "ref"), expected["gamma"])
    model.set_task(None)
    with pytest.warns(UserWarning, match=f"default task '{default_task or 'alpha'}' of 3"):
        assert torch.equal(with_adapter(model, "ref"), expected[default_task or "alpha"])
    # What the copy was pinned to itself stays.
    model.set_adapter("ref")
    model.set_task("gamma")
    model.set_adapter("default")
    model.set_task("beta")
    assert torch.equal(with_adapter(model, "ref"), expected["gamma"])
    assert torch.equal(logits(model, BATCH), expected["beta"])


def test_a_copy_trains_the_pinned_task() -> None:
    model = policy()
    model.set_task("beta")
    add_reference(model)
    batch = example_batch("llama")
    found = []
    for adapter_name, routing in (("default", {}), ("ref", {}), ("ref", {"tasks": "beta"})):
        model.set_adapter(adapter_name)
        model.train()
        model.zero_grad()
        model(**batch, **routing).loss.backward()
        found.append({name: p.grad for name, p in adapter_parameters(model, adapter_name).items()})
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values(), one.values(), strict=True))
        assert any(gradient.any() for gradient in one.values())


def test_merging_a_copy_merges_the_pinned_task() -> None:
    model = policy()
    model.set_task("beta")
    add_reference(model)
    expected = logits(model, BATCH)
    model.set_adapter("ref")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BATCH), expected)
    torch.testing.assert_close(logits(model, BATCH, tasks="beta"), expected)


def test_an_adapter_that_does_not_know_the_pinned_task_is_refused() -> None:
    model = policy(target_modules=["q_proj"])
    model.add_adapter("other", adapter_config(tasks=["one", "two"], target_modules=["q_proj"]))
    model.add_adapter("chosen", adapter_config(tasks=["one", "two"], default_task="two", target_modules=["q_proj"]))
    model.add_adapter("single", adapter_config(tasks=["one"], target_modules=["q_proj"]))
    make_active(model)
    model.set_task("beta")
    model.set_adapter("other")
    message = r"^Task 'beta' is pinned, but adapter 'other' does not know it: its tasks are one, two\. Pin one of them"
    with pytest.raises(ValueError, match=message):
        logits(model, BATCH)
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()
    assert not model.base_model.router.merged
    named = logits(model, BATCH, tasks="two")
    model.set_task("two")
    assert torch.equal(logits(model, BATCH), named)
    assert torch.equal(with_adapter(model, "default"), with_adapter(model, "default", tasks="beta"))
    model.set_adapter("default")
    model.set_task("beta")
    # A default that was chosen, or the only task, is no guess.
    with pytest.warns(UserWarning, match="default task 'two' of 2"):
        assert torch.equal(with_adapter(model, "chosen"), with_adapter(model, "chosen", tasks="two"))
    assert torch.equal(with_adapter(model, "single"), with_adapter(model, "single", tasks="one"))


def test_a_pin_goes_with_the_adapter_that_was_pinned() -> None:
    model = policy(target_modules=["q_proj"])
    model.add_adapter("other", adapter_config(tasks=["one", "two"], target_modules=["q_proj"]))
    model.add_adapter("third", model.peft_config["default"])
    make_active(model)
    model.set_task("beta")
    model.set_adapter("third")
    model.set_task("beta")
    model.set_adapter("other")
    model.delete_adapter("third")
    with pytest.raises(ValueError, match=r"^Task 'beta' is pinned, but adapter 'other' does not know it"):
        logits(model, BATCH)
    model.delete_adapter("default")
    with pytest.warns(UserWarning, match="default task 'one' of 2"):
        assert torch.equal(logits(model, BATCH), logits(model, BATCH, tasks="one"))


def test_a_followed_pin_follows_the_name_and_guards_its_task() -> None:
    model = policy()
    expected = logits(model, BATCH, tasks="beta")
    model.set_task("beta")
    add_reference(model)
    model.set_adapter("ref")
    with pytest.raises(ValueError, match="'beta' cannot be removed: it is pinned"):
        model.remove_task("beta")
    model.rename_task("beta", "second")
    assert torch.equal(logits(model, BATCH), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model, BATCH), expected)
    model.rename_task("beta", "third")
    assert torch.equal(logits(model, BATCH), expected)
    assert torch.equal(with_adapter(model, "ref"), expected)


def test_a_name_of_one_adapter_leaves_others_their_pin() -> None:
    model = policy()
    model.set_task("alpha")
    model.add_adapter("second", adapter_config(target_modules="all-linear", default_task="beta"))
    expected = with_adapter(model, "second", tasks="alpha")
    model.set_adapter("default")
    model.rename_task("alpha", "first")
    assert torch.equal(logits(model, BATCH), logits(model, BATCH, tasks="first"))
    assert torch.equal(with_adapter(model, "second"), expected)


def test_a_reloaded_policy_has_no_pin(tmp_path: Path) -> None:
    model = policy()
    model.set_task("beta")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="trains 3 tasks, but this batch does not say which"):
        loaded.train()(**example_batch("llama"))
    loaded.set_task("beta")
    assert torch.equal(logits(add_reference(loaded), BATCH), with_adapter(loaded, "ref"))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "which", "colour", "red", "blue"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
# TRL computes the reference in advance as it is constructed.
@pytest.mark.parametrize(("pinned_after", "precompute"), [(False, False), (True, False), (False, True)])
def test_preference_training_starts_at_its_reference(tmp_path: Path, pinned_after: bool, precompute: bool) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model = policy()
    model.set_task("gamma" if pinned_after else "beta")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=precompute,
    )
    rows = [{"prompt": "which colour ", "chosen": "red", "rejected": "blue"}] * 4
    trainer = trl.DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    model.set_task("beta")
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert float(first["rewards/chosen"]) == pytest.approx(0, abs=1e-4)


def test_the_model_tells_its_tasks_and_the_one_in_force() -> None:
    model = adapted_model("llama", default_task="beta")
    assert model.tasks == TASKS
    assert model.active_task == "beta"
    assert "default: 3 tasks\n" in repr(model)
    model.set_task("gamma")
    assert model.active_task == "gamma"
    assert "default: 3 tasks, 'gamma' pinned\n" in repr(model)
    model.set_task(None)
    model.rename_task("beta", "delta")
    assert (model.tasks, model.active_task) == (["alpha", "delta", "gamma"], "delta")
