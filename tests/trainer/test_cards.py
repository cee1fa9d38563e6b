"""The card that a trainer writes: results and facts of the weights that lie beside it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hyperadapt.cards.card import write_card
from hyperadapt.trainer import HyperAdapterTrainer
from tests.support.card_schema import check_card
from tests.support.helpers import TASKS, adapted_model
from tests.trainer.test_trainer import accuracy, arguments, data


def test_the_card_tells_the_last_results_and_the_training(tmp_path: Path) -> None:
    model = adapted_model("bert", task_type="SEQ_CLS")
    data_of_tasks = data("bert")
    trainer = HyperAdapterTrainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=2, seed=7),
        train_dataset=data_of_tasks,
        eval_dataset=data_of_tasks,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(language="en", tags="mine", model_name="my-adapter", dataset="not used")
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card)
    assert card.data.model_name == "my-adapter"
    assert card.data.tags[-1] == "mine"
    last = trainer.state.log_history
    expected = {}
    for task in TASKS:
        [entry] = [entry for entry in last if f"eval_{task}_loss" in entry and entry["step"] == 4]
        expected |= {(task, name): entry[f"eval_{task}_{name}"] for name in ("accuracy", "loss")}
        labels = data_of_tasks[task]["labels"]
        expected[task, "majority"] = max(map(labels.count, labels)) / len(labels)
    assert {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results} == expected
    for text in ("- steps: 4", "- batch size: 6", "- learning rate: 0.01", "- seed: 7"):
        assert text in card.text
    (tmp_path / "README.md").write_text("# My own words")
    trainer.create_model_card()
    assert "# My own words" in (tmp_path / "README.md").read_text()


def test_the_card_of_a_checkpoint_names_its_folder(tmp_path: Path) -> None:
    options = arguments(tmp_path, save_strategy="steps", save_steps=2)
    HyperAdapterTrainer(adapted_model("bert"), options, train_dataset=data("bert")).train()
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert f'PeftModel.from_pretrained(base_model, "{checkpoint}")' in (checkpoint / "README.md").read_text()


def test_the_card_tells_the_results_of_the_weights_that_are_there(tmp_path: Path) -> None:
    rows = data("bert")
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"metric_for_best_model": "mean_loss", "greater_is_better": False, "learning_rate": 10.0}
    trainer = HyperAdapterTrainer(
        adapted_model("bert", task_type="SEQ_CLS", normalization="none"),
        arguments(tmp_path, load_best_model_at_end=True, **options),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    history, best = list(trainer.state.log_history), trainer.state.best_global_step
    assert best in range(1, 4), "the learning rate is meant to be far too high"
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    found = {one.dataset_name: one.metric_value for one in card.data.eval_results if one.metric_type == "loss"}
    assert found == {
        task: next(
            entry[f"eval_{task}_loss"] for entry in history if entry.get(f"eval_{task}_loss") and entry["step"] == best
        )
        for task in TASKS
    }
    # Without the trainer nothing tells which weights they are.
    (tmp_path / "README.md").unlink()
    write_card(trainer.model, tmp_path)
    assert not ModelCard.load(tmp_path / "README.md").data.eval_results
