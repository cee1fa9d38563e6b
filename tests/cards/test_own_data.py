"""What a card takes from the tasks' own data, and from what any trainer left in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from hyperadapt.cards import write_card
from tests.support.card_schema import check_card, python_code
from tests.support.helpers import adapted_model, example_batch

CHAT = [{"role": "user", "content": "Is it 'good'?"}]


def card_of(folder: Path, **facts: Any) -> ModelCard:
    model = adapted_model("llama", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = "org/base"
    write_card(model, folder, overwrite=True, **facts)
    card = ModelCard.load(folder / "README.md")
    check_card(card)
    return card


@pytest.mark.parametrize(
    ("prompt", "lines", "widget"),
    [
        (
            'Say "a"\nand ä',
            [r'inputs = tokenizer("Say \"a\"\nand ä", return_tensors="pt")'],
            {"text": 'Say "a"\nand ä'},
        ),
        (
            ["one", "two"],
            ['inputs = tokenizer("one", "two", return_tensors="pt")'],
            {"text": "one", "text_pair": "two"},
        ),
        (
            CHAT,
            [
                f"messages = {CHAT!r}",
                "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
                'return_tensors="pt")',
            ],
            {"messages": CHAT},
        ),
    ],
)
def test_the_input_is_the_tasks_own(tmp_path: Path, prompt: Any, lines: list[str], widget: dict[str, Any]) -> None:
    card = card_of(tmp_path, prompts={"beta": prompt})
    [code] = python_code(card.text)
    assert "\n".join(lines) in code
    # It is asked of its own task.
    assert 'tasks="beta"' in code
    assert yaml.safe_load(card.content.split("---")[1])["widget"] == [{**widget, "example_title": "beta"}]
    compile(code, "card", "exec")


def test_the_default_task_comes_first(tmp_path: Path) -> None:
    [code] = python_code(card_of(tmp_path, prompts={"beta": "b", "alpha": "a"}).text)
    assert 'tokenizer("a", return_tensors="pt")' in code
    assert 'tasks="alpha"' in code
    [code] = python_code(card_of(tmp_path).text)
    assert "What does the sun weigh?" in code


def test_labels_stand_beside_the_task(tmp_path: Path) -> None:
    text = card_of(tmp_path, labels={"alpha": ["no", "y|s"], "beta": [str(index) for index in range(12)]}).text
    assert "| task | description | labels |" in text
    assert "| `alpha` |  | `no`, `y\\|s` |" in text
    assert "| `beta` |  | `0`, `1`, `2`, `3`, `4`, `5`, `6`, `7`, `8`, `9`, and 2 more |" in text
    assert "| `gamma` |  |  |" in text


@pytest.mark.parametrize("fact", ["prompts", "labels", "results"])
def test_unknown_tasks_are_refused(tmp_path: Path, fact: str) -> None:
    with pytest.raises(ValueError, match=rf"{fact} names \['other'\], which are no tasks of the adapter"):
        card_of(tmp_path, **{fact: {"other": {}}})


def test_a_plain_trainer_tells_of_its_training(tmp_path: Path) -> None:
    model = adapted_model("llama", task_type="CAUSAL_LM")
    model.set_task("alpha")
    batch = example_batch("llama", labels=True)
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset={"alpha": rows, "other": rows})
    trainer.train()
    write_card(model, tmp_path, overwrite=True)
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card)
    for line in ("- steps: 3", "- batch size: 2", "- learning rate: 0.001", "- epochs: ", "- last training loss: "):
        assert line in card.text, line
    assert "Measured on the validation split, one run." in card.text
    assert [(one.dataset_name, one.metric_type) for one in card.data.eval_results] == [("alpha", "loss")]
    # What is told by the caller counts.
    write_card(model, tmp_path, overwrite=True, training={"steps": 7})
    text = (tmp_path / "README.md").read_text()
    assert "- steps: 7" in text
    assert "batch size" not in text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"global_step": "3"}', json.dumps({"global_step": 2, "log_history": [3, {"loss": "x"}]})]
)
def test_a_state_that_is_damaged_tells_nothing_wrong(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    text = card_of(tmp_path).text
    assert ("- steps: 2\n" in text) == ("log_history" in content)
    assert ("Not recorded." in text) != ("log_history" in content)
