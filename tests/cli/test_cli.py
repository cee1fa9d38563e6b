"""The command line: results on the standard output, errors in a line, exit codes, and the whole way to the Hub."""

import errno
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel

import hyperadapt_cli as cli
from examples import write_recipe
from examples.support.text_tasks import encoder_path
from hyperadapt import LoraGenerator, runs
from hyperadapt.cards.card import MARKER
from hyperadapt.loras.generator import loras_of
from hyperadapt.loras.library import unfinished_library
from hyperadapt.runs import load_run, train
from tests.support import tiny_runs
from tests.support.card_schema import check_card
from tests.support.command_line import CommandLine
from tests.support.helpers import ROOT, run_python
from tests.support.hub_server import HubServer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model, with text descriptions; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    return train(tiny_runs.recipe(folder)).folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be changed, beside it: its recipe names files relative to the folder."""
    return Path(shutil.copytree(trained, trained.parent / tmp_path.name))


def test_the_whole_way(
    hub: HubServer, hyperadapt: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train -> evaluate -> add-task -> export -> push -> load in a fresh process, with real MiniLM weights."""
    try:
        minilm = encoder_path()
        base = "sentence-transformers/all-MiniLM-L6-v2"
        hub.add_repo(base, {str(path.relative_to(minilm)): path for path in minilm.rglob("*") if path.is_file()})
        options = ["--tasks", "trec6", "movie_sent", "--rows", "60", "--steps", "4", "--base-model", base]
        monkeypatch.setattr("sys.argv", ["write_recipe", str(tmp_path / "data"), *options])
        write_recipe.main()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    adapter, exported = tmp_path / "adapter", tmp_path / "lora"

    result = hyperadapt.json("train", tmp_path / "data" / "recipe.yaml", "--output", adapter)
    assert result["folder"] == str(adapter)
    assert set(result["tasks"]) == {"trec6", "movie_sent"}
    again = hyperadapt.json("evaluate", adapter)
    assert again["tasks"]["trec6"] == result["tasks"]["trec6"]
    held_out = tmp_path / "data" / "nyt_sent"
    hyperadapt(
        "add-task", adapter, "nyt_sent", "--examples", held_out / "examples.jsonl", "--test", held_out / "test.jsonl"
    )
    results = hyperadapt.json("evaluate", adapter)
    assert set(results["tasks"]) == {"trec6", "movie_sent", "nyt_sent"}
    assert results["tasks"]["trec6"] == result["tasks"]["trec6"]
    hyperadapt("export", adapter, exported, "--task", "nyt_sent")
    assert "published: " in hyperadapt("push", adapter, "user/first")
    hyperadapt("push", exported, "user/first-nyt", "--private")

    card = ModelCard(hub.files("user/first")["README.md"].decode())
    check_card(card)
    assert card.data.base_model == base
    scores = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert scores["nyt_sent", "accuracy"] == results["tasks"]["nyt_sent"]["accuracy"]
    assert "![Cosines between the tasks' updates](figures/cosines.png)" in card.text
    assert "figures/cosines.png" in hub.files("user/first")
    lora_card = ModelCard(hub.files("user/first-nyt")["README.md"].decode())
    check_card(lora_card)
    assert lora_card.data.library_name == "peft"

    # A fresh process that knows nothing but the two cards runs their code as it is written.
    codes = [re.findall(r"```python\n(.*?)```", one.text, re.DOTALL)[0] for one in (lora_card, card)]
    check = (
        "import sys\nassert not any(name.startswith('hyperadapt') for name in sys.modules)\n"
        "question = inputs\nlora = model(**question).logits.detach()\n"
    )
    # The adapter's card asks what a row of its data asks.
    compare = (
        "import torch\nlive = model(**question, tasks='nyt_sent').logits.detach()\n"
        "assert torch.allclose(lora, live, atol=1e-4), (lora, live)\n"
        "assert not torch.equal(live, model(**question, tasks='trec6').logits.detach())\n"
    )
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    run_python("\n".join([codes[0], check, codes[1], compare]))


def test_commands_print_for_people(hyperadapt: CommandLine, adapter: Path) -> None:
    lines = hyperadapt("evaluate", adapter).splitlines()
    assert lines[0] == "test split"
    assert lines[1].split() == ["task", "rows", "majority", "accuracy", "loss"]
    assert [line.split()[0] for line in lines[2:6]] == ["reviews", "letters", "mail", "mean"]
    assert hyperadapt("diagnose", adapter).startswith("3 tasks at ")
    assert "Gram matrices by " in hyperadapt("doctor")
    for name in ("train", "add-task", "generate", "export", "push", "card", "plot", "doctor"):
        assert name in hyperadapt("--help")
    assert "--format" in hyperadapt("export", "--help")


def test_commands_print_for_machines(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = hyperadapt.json("evaluate", adapter, "--task", "mail", "--split", "validation")
    assert list(results["tasks"]) == ["mail"]
    assert results["tasks"]["mail"]["rows"] == 12
    # Of some tasks alone, nothing is recorded.
    assert load_run(adapter).record.results["split"] == "test"
    diagnosis = hyperadapt.json("diagnose", adapter, "--task", "mail", "--task", "letters")
    assert diagnosis["tasks"] == ["mail", "letters"]
    assert 0 <= diagnosis["share"] <= 1
    assert 0 <= diagnosis["saturated_share"] <= 1
    assert all(0 <= share <= 1 for share in diagnosis["saturated_layers"].values())
    files = hyperadapt.json("plot", adapter, tmp_path / "pictures")["files"]
    assert {Path(file).suffix for file in files} == {".png", ".svg"}
    assert all(Path(file).exists() for file in files)
    assert hyperadapt.json("doctor")["versions"]["python"].startswith("3.")
    folders = hyperadapt.json("export", adapter, tmp_path / "all", "--all")["folders"]
    assert set(folders) == {"reviews", "letters", "mail"}
    assert all((Path(folder) / "adapter_model.safetensors").exists() for folder in folders.values())
    card = hyperadapt.json("card", adapter)["card"]
    check_card(ModelCard.load(card))


def test_no_command_that_needs_no_base_model_loads_one(
    hyperadapt: CommandLine, adapter: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for kind in (PreTrainedModel, PeftModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        monkeypatch.setattr(kind, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    commands: dict[str, list[object]] = {
        "export": ["--task", "mail"],
        "diagnose": [],
        "plot": [],
        "card": [],
        "push": [],
        "generate": ["--description", "Find the tone."],
    }
    places = {"export": [tmp_path / "lora"], "plot": [tmp_path / "plots"], "push": ["user/adapter"]}
    for name, options in commands.items():
        place = places.get(name, [tmp_path / "generated"] if name == "generate" else [])
        # The adapter knows no text, which is told without its base model.
        hyperadapt(name, adapter, *place, *options, code=int(name == "generate"))
        text = re.sub(r"\s*[│╭╮╰╯─]\s*|\s+", " ", hyperadapt(name, "--help"))
        assert re.search(r"without loading the base model|base model is not loaded|No model is loaded", text), text
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert "README.md" in hub.files("user/adapter")


def test_an_export_of_all_tasks_goes_on(hyperadapt: CommandLine, adapter: Path, tmp_path: Path) -> None:
    generator = LoraGenerator.from_pretrained(adapter)
    with suppress(KeyboardInterrupt), unfinished_library(tmp_path / "all", generator.fingerprint(), "peft") as library:
        library.add(next(loras_of(generator, ["letters"])))
        raise KeyboardInterrupt
    before = (tmp_path / "all" / "letters" / "README.md").stat().st_ino
    hyperadapt("export", adapter, tmp_path / "all", "--all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"reviews", "letters", "mail"}
    assert (tmp_path / "all" / "letters" / "README.md").stat().st_ino == before
    assert "LoRA/s" in hyperadapt.stderr


def test_a_description_becomes_a_lora_on_the_command_line(
    hyperadapt: CommandLine, adapter: Path, tmp_path: Path
) -> None:
    output = hyperadapt("generate", adapter, tmp_path / "lora", "--description", "Find the tone.", code=1)
    assert output == ""
    assert "error: This adapter has no task with a description" in hyperadapt.stderr
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "positive"}\n{"text": "b", "label": "negative"}\n')
    hyperadapt("generate", adapter, tmp_path / "lora", "--examples", tmp_path / "rows.jsonl", code=1)
    assert "error: This adapter has no task with examples" in hyperadapt.stderr
    hyperadapt("generate", adapter, tmp_path / "lora", code=2)
    assert "--description TEXT or --examples FILE" in re.sub(r"[\s│]+", " ", hyperadapt.stderr)
    assert not (tmp_path / "lora").exists()


def test_a_card_of_ones_own_is_kept(hyperadapt: CommandLine, adapter: Path) -> None:
    hyperadapt("card", adapter)
    path = adapter / "README.md"
    assert MARKER in path.read_text()
    path.write_text(path.read_text().replace(MARKER, "My own words.").replace("## Tasks", "## Mine"))
    hyperadapt("evaluate", adapter)
    assert "My own words." in path.read_text()
    assert "## Mine" in path.read_text()


def test_a_folder_that_is_read_only_is_measured(
    hyperadapt: CommandLine, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    results = hyperadapt.json("evaluate", adapter)
    monkeypatch.setattr(runs, "save_record", refuse)
    assert hyperadapt.json("evaluate", adapter) == results
    lines = hyperadapt("evaluate", adapter).splitlines()
    assert lines[-1] == f"not recorded, since {adapter} cannot be written (Permission denied)"


def test_results_of_rows_that_were_trained_on_say_so(hyperadapt: CommandLine, tmp_path: Path) -> None:
    tasks = {"mail": {"train": "data/mail/train.jsonl"}}
    path = tiny_runs.write_recipe(tmp_path, "SEQ_CLS", {"tasks": tasks, **tiny_runs.training(max_steps=1)})
    lines = hyperadapt("train", path).splitlines()
    assert lines[0] == "train split"
    assert lines[-3:] == [
        "These rows were trained on. Add test files to the recipe to see how other rows fare.",
        "",
        f"saved to {tmp_path / 'run'}",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "nowhere/at/all"], 1, "error: There is no folder 'nowhere/at/all'. Name the folder"),
        (["diagnose", "./nowhere"], 1, "error: There is no folder './nowhere'."),
        (["export", "nowhere", "OUT", "--all"], 1, "error: There is no folder 'nowhere'."),
        (["plot", "RECIPE", "OUT"], 1, "is a file. Name the folder of a trained adapter."),
        (["evaluate", "ADAPTER", "--split", "other"], 2, "'other' is not one of"),
        (["evaluate", "ADAPTER", "--task", "unknown"], 1, "--task names ['unknown'], which are no tasks of the run."),
        (["export", "ADAPTER", "OUT", "--task", "unknown"], 1, "Unknown task 'unknown'."),
        (["export", "ADAPTER", "OUT", "--task", "mail", "--format", "zip"], 2, "'zip' is not one of"),
        (["export", "ADAPTER", "OUT", "--task", "mail", "--format", "mlx"], 1, "error: --format 'mlx' takes "),
        (["export", "ADAPTER", "RECIPE", "--all"], 2, "is a file."),
        (["train", "RECIPE", "--resume", "--overwrite"], 2, "Give --resume or --overwrite, not both."),
        (["export", "ADAPTER", "OUT"], 2, "Give the tasks with --task NAME, or all of them with --all."),
        (["add-task", "user/repo", "new", "--description", "x"], 2, "is a name on the Hub. Name a folder to write to"),
        (
            ["add-task", "ADAPTER", "mail", "--description", "x", "--label", "mail"],
            1,
            "There already is a task 'mail'. Choose another name.",
        ),
        (["diagnose", "ADAPTER", "--task", "unknown"], 1, "Unknown task 'unknown'."),
        (["push", "EMPTY", "user/repo"], 1, "holds no adapter"),
        (["train", "RECIPE"], 2, "RECIPE:2: "),
        (["train", "no-file.yaml"], 2, "does not exist"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_told_in_a_line(
    hyperadapt: CommandLine, adapter: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base_model: base\nadapters: {}\n")
    places = {"ADAPTER": adapter, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "RECIPE": recipe}
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    assert hyperadapt(*[places.get(one, one) for one in arguments], code=code) == ""
    text = re.sub(r"\s*[│╭╮╰╯─]\s*|\s+", " ", hyperadapt.stderr)
    assert message.replace("RECIPE", str(recipe)) in text
    assert "Traceback" not in hyperadapt.stderr
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_errors_for_machines(hyperadapt: CommandLine, adapter: Path) -> None:
    error = hyperadapt.json("evaluate", adapter, "--task", "unknown", code=1)["error"]
    assert error["type"] == "ValueError"
    assert error["message"].startswith("--task names ['unknown']")
    error = hyperadapt.json("evaluate", adapter / "nowhere", code=1)["error"]
    assert error["type"] == "FileNotFoundError"


def test_a_traceback_can_be_asked_for(hyperadapt: CommandLine, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERADAPT_TRACEBACK", "1")
    monkeypatch.setattr("sys.argv", ["hyperadapt", "evaluate", str(adapter), "--task", "unknown"])
    with pytest.raises(ValueError, match="tasks names"):
        cli.main()


def test_an_interrupted_command(hyperadapt: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperadapt_cli.doctor.report", interrupt)
    hyperadapt("doctor", code=130)


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hyperadapt", "doctor", "--json"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert json.loads(result.stdout)["versions"]["hyperadapt"]
