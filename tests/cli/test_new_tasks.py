"""New tasks on the command line: controls of descriptions, training with old tasks' rows, and what is told of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hyperadapt.runs import Record, load_run, train
from hyperadapt.tasks import encoders
from hyperadapt_cli.output import CONTROLS
from tests.support.card_schema import check_card
from tests.support.command_line import CommandLine
from tests.support.helpers import letters
from tests.support.tiny_runs import ADAPTER, contents, labelled_rows, recipe, training, write_rows

SOURCES = {"reviews": "text", "letters": "both", "mail": "learned"}


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encodes descriptions by their letters, whatever encoder is named."""

    def encode_texts(encoder: str, texts: list[str], revision: str | None = None) -> tuple[torch.Tensor, None]:
        return letters(texts), None

    monkeypatch.setattr(encoders, "encode_texts", encode_texts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose tasks come from all sources; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    adapter = {"task_type": "SEQ_CLS", **ADAPTER, "task_embedding": SOURCES, "text_encoder": "base"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "encode_texts", lambda encoder, texts, revision=None: (letters(texts), None))
        run = train(recipe(folder, adapter=adapter, **training(max_steps=4)), report=None, figures=False).folder
    write_rows(folder / "new.jsonl", labelled_rows(12, 1, {"a": "positive", "b": "negative"}))
    return run


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, beside the run's data."""
    return Path(shutil.copytree(trained, trained.parent / tmp_path.name))


def test_controls_for_people_and_for_machines(hyperadapt: CommandLine, adapter: Path) -> None:
    text = hyperadapt("evaluate", adapter, "--controls")
    lines = text.split("\ncontrols\n")[1].splitlines()
    assert lines[0].split() == ["task", "condition", "true", "gains", "95%", "interval", "accuracy"]
    arms = ["true", "shuffled", "blank", "unrelated"]
    expected = [("reviews", arm) for arm in arms] + [("letters", arm) for arm in [*arms, "task"]]
    expected += [("mail", arm) for arm in arms[:2]]
    assert [tuple(line.split()[:2]) for line in lines[1 : len(expected) + 1]] == expected
    assert re.fullmatch(r"reviews +blank +-?\d\.\d{3} +-?\d\.\d{3} to -?\d\.\d{3} +\d\.\d{3}", lines[3])
    assert "mail: no blank condition, since the task's embedding reads no description" in lines
    # After four steps no description matters.
    assert "reviews: the true condition is not above every control: do not rely on it" in lines

    results = hyperadapt.json("evaluate", adapter, "--controls", "--task", "reviews")
    found = results["tasks"]["reviews"]["controls"]
    assert (found["task"], found["rows"], found["is_above"], found["without"]) == ("reviews", 16, False, {})
    assert [arm["name"] for arm in found["arms"]] == arms
    # As it is measured without controls.
    assert found["arms"][0]["mean"] == results["tasks"]["reviews"]["accuracy"]
    recorded = Record.load(adapter).results["tasks"]
    assert recorded["reviews"]["controls"] == found
    assert [arm["name"] for arm in recorded["letters"]["controls"]["arms"]] == [*arms, "task"]
    check_card(ModelCard.load(adapter / "README.md"))


def test_what_a_description_is_to_be_compared_with_is_told(
    hyperadapt: CommandLine, adapter: Path, tmp_path: Path
) -> None:
    assert hyperadapt("generate", adapter, tmp_path / "lora", "--description", "Is it a?").splitlines() == [
        f"LoRA saved to {tmp_path / 'lora'}",
        CONTROLS,
    ]
    result = hyperadapt.json("generate", adapter, tmp_path / "lora", "--description", "Is it a?")
    assert result == {"folder": str(tmp_path / "lora"), "controls": CONTROLS}
    labels = ["--label", "positive", "--label", "negative"]
    assert hyperadapt("add-task", adapter, "new", "--description", "Is it a?", *labels).splitlines() == [
        "new: added by its description, and not tried on any row",
        f"4 tasks, with 'new', saved to {adapter}",
        CONTROLS,
    ]
    result = hyperadapt.json("add-task", adapter, "newer", "--description", "Is it b?", *labels)
    assert result["controls"] == CONTROLS
    assert (result["examples"], result["old_tasks"]) == (None, {})


def test_a_task_is_fitted_and_its_fit_is_told(hyperadapt: CommandLine, adapter: Path) -> None:
    result = hyperadapt.json("add-task", adapter, "new", "--examples", adapter.parent / "new.jsonl")
    assert result["examples"].keys() == {"accuracy", "loss", "rows", "majority"}
    assert result["examples"]["rows"] == 12
    assert "controls" not in result
    text = hyperadapt("add-task", adapter, "newer", "--examples", adapter.parent / "new.jsonl")
    assert text.startswith("newer, on its own 12 examples: accuracy ")


def test_a_task_is_trained(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    data = adapter.parent / "data"
    before = contents(adapter)
    options = ["--examples", adapter.parent / "new.jsonl", "--test", data / "letters" / "test.jsonl", "--train"]
    options += ["--replay", f"mail={data / 'mail' / 'validation.jsonl'}", "--steps", 40, "--learning-rate", 1e-2]
    text = hyperadapt("add-task", adapter, "new", *options, "--output", tmp_path / "second")
    assert contents(adapter) == before
    assert "training on 12 rows of new and 92 of 3 old tasks" in hyperadapt.stderr
    assert "step 40 of 40: loss " in hyperadapt.stderr
    lines = text.splitlines()
    assert lines[0].startswith("new, on its own 12 examples: accuracy ")
    assert re.fullmatch(r"  mail: \d\.\d{3} before, \d\.\d{3} after \(replay, 12 rows\)", lines[-2])
    assert lines[-1] == f"4 tasks, with 'new', saved to {tmp_path / 'second'}"
    run = load_run(tmp_path / "second")
    assert run.recipe.adapter_config.task_names == ["reviews", "letters", "mail", "new"]
    card = ModelCard.load(tmp_path / "second" / "README.md")
    check_card(card)
    assert "added tasks: new steps 40, learning rate 0.01" in card.text.replace("_", " ")
    results = hyperadapt.json("evaluate", tmp_path / "second")["tasks"]
    assert results.keys() == {"reviews", "letters", "mail", "new"}

    result = hyperadapt.json("add-task", adapter, "newer", *options)
    assert result["tasks"] == ["reviews", "letters", "mail", "newer"]
    assert result["old_tasks"]["reviews"].keys() == {"before", "after", "rows", "split"}
    assert result["no_better_than_majority"] in (True, False)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--description", "x", "--train", "--label", "mail"], 2, "--train needs rows to train on. Give them with"),
        (["--examples", "NEW", "--steps", "3"], 2, "--steps: this is for --train."),
        (["--examples", "NEW", "--train", "--learning-rate", "-1"], 1, "error: --learning-rate -1.0 must be a finite"),
        (["--examples", "RECIPE"], 1, "recipe.yaml' has an unknown ending."),
        (["--description", "x"], 1, "error: Task 'new' needs --label, the names"),
        (["--examples", "NEW", "--output", "NEW"], 2, "is a file."),
        (["--description", "x", "--label", "mail", "--output", "BASE"], 2, "is a folder with files. Name a new one"),
        (["--examples", "NEW", "--train", "--steps", "0"], 2, "Invalid value for '--steps'"),
        (["--examples", "NEW", "--train", "--replay", "mail"], 2, "--replay 'mail' is not of the form TASK=FILE."),
        (["--examples", "NEW", "--train", "--replay", "=NEW"], 2, "is not of the form TASK=FILE."),
        (["--examples", "NEW", "--train", "--replay", "mail=a", "--replay", "mail=b"], 2, "names 'mail' twice."),
        (
            ["--examples", "NEW", "--train", "--replay", "post=a.csv"],
            1,
            "error: --replay names ['post'], which are no old tasks",
        ),
    ],
)
def test_errors_change_nothing(
    hyperadapt: CommandLine, adapter: Path, options: list[str], code: int, message: str
) -> None:
    before = contents(adapter)
    places = {"NEW": adapter.parent / "new.jsonl", "RECIPE": adapter / "recipe.yaml", "BASE": adapter.parent / "base"}
    given = [str(places[one]) if one in places else one.replace("=NEW", "=new.jsonl") for one in options]
    assert hyperadapt("add-task", adapter, "new", *given, code=code) == ""
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", hyperadapt.stderr)
    assert message in text
    assert "Traceback" not in text
    assert contents(adapter) == before


def test_a_task_at_its_most_frequent_answer_is_told(hyperadapt: CommandLine, adapter: Path) -> None:
    run = load_run(adapter)
    bias = run.model.base_model.model.classifier.modules_to_save["default"].bias
    with torch.no_grad():
        bias[run.recipe.labels.index("junk")] += 1e3
        bias[run.recipe.labels.index("negative")] += 1e3
    run.model.save_pretrained(str(adapter))
    results = hyperadapt.json("evaluate", adapter)
    weak = results["no_better_than_majority"]
    assert "mail" in weak
    for name, values in results["tasks"].items():
        assert (name in weak) == (values["accuracy"] <= values["majority"])
    lines = hyperadapt("evaluate", adapter).splitlines()
    values = results["tasks"]["mail"]
    line = (
        f"mail: an accuracy of {values['accuracy']:.3f} is no better than always giving its most frequent answer "
        f"({values['majority']:.3f})"
    )
    assert lines.count(line) == 1
    card = ModelCard.load(adapter / "README.md")
    check_card(card)
    assert "Task `mail` is no better than always giving its most frequent answer." in card.text
    scores = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert scores["mail", "majority"] == values["majority"]
