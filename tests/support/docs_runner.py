"""Runs the code blocks of a page in order, in the current folder and one namespace."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import hyperadapt_cli as cli
from examples import write_recipe
from examples.support.encoder import load_base
from examples.support.text_tasks import TextTask, write_rows
from hyperadapt import HyperAdapterConfig
from hyperadapt.recipes import load_recipe
from hyperadapt.recipes.schema import SPLITS
from hyperadapt.trainer import concatenate_tasks
from tests.support.docs_pages import ROOT, Block
from tests.support.docs_standins import CAUSAL, ENCODER
from tests.support.helpers import make_active, minilm
from tests.support.served import SETTINGS

_FILE = re.compile(r"# (\S+\.yaml)\n")
_EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
# Programs that belong to others. What they do with our files is not run here.
_FOREIGN = re.compile(
    r"hf (auth login|upload .+)|git clone \S+|vllm serve .+|python -m sglang\.launch_server .+|"
    r"python convert_lora_to_gguf\.py .+|llama-cli .+|mlx_lm\.generate .+|curl .+|"
    r"mkdocs (serve|build --strict)|python -c .+ experiments/hyperadapter/\S+"
    r"|lm_eval run .+|python -m hyperadapt\.runs\.harness run .+"
)

# A variable of the environment that is set for a command.
_SETTING = re.compile(r"(?P<own>HYPERADAPT_\w+)?\w*=\S+\s+")


def run(block: Block, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block, or check it where it cannot be run; an error names page and line."""
    if block.setup is not None:
        _SETUPS[block.setup](namespace)
    try:
        match block.language:
            case "python":
                _run_python(block, namespace)
            case "bash":
                for command in commands(block.text):
                    _run_command(command, monkeypatch)
            case "yaml":
                _check_yaml(block)
            case "json":
                _check_json(block.text)
            case "text" | "bibtex":
                pass
            case language:
                raise ValueError(f"the language {language!r} is not known")
    except Exception as error:
        error.add_note(f"in the {block.language} block at {block.place}")
        raise


def commands(text: str) -> list[str]:
    """The commands of a block of shell, each in one line."""
    lines = (line.partition(" # ")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [one.strip() for line in lines if line and not line.startswith("#") for one in line.split("&&")]


def _run_python(block: Block, namespace: dict[str, Any]) -> None:
    tree = ast.parse(block.text, block.page)
    exec(compile(ast.increment_lineno(tree, block.line), block.page, "exec"), namespace)


def _run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    while match := _SETTING.match(command):
        assert match["own"] is None or match["own"] in SETTINGS, f"{match['own']} is no setting"
        command = command[match.end() :]
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "hyperadapt"]:
        words = words[2:]
    if words[0] == "hyperadapt":
        monkeypatch.setattr(sys, "argv", words)
        # The command line would have warnings shown in its own way from then on.
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, f"{command!r} exited with {end.value.code}"
    elif not _FOREIGN.fullmatch(command):
        _check_own_command(words)


def _check_own_command(words: list[str]) -> None:
    """Check that what a command names is there, for those that take too long or need the network."""
    match words:
        case ["pip", "install", *arguments]:
            for before, word in zip(["", *arguments], arguments, strict=False):
                if before in ("-c", "-r"):
                    assert (ROOT / word).is_file(), f"{word} does not exist"
                for extra in re.findall(r"(?:hyperadapt|\.)\[(.*)\]", word):
                    assert set(extra.split(",")) <= set(_EXTRAS), f"{word} names an unknown extra"
        case ["accelerate", "launch", *arguments, "-m", module]:
            assert all((ROOT / word).is_file() for word in arguments if word.endswith(".yaml")), f"{arguments}"
            _check_module([module])
        case ["python", "-m", *module]:
            _check_module(module)
        case ["python", script, *options] if script.startswith("examples/"):
            _check_module([script.removesuffix(".py").replace("/", "."), *options])
        case _:
            raise ValueError(f"the command {shlex.join(words)!r} is neither run nor on the list of those that are not")


def _check_module(words: list[str]) -> None:
    name, *options = words
    path = ROOT / name.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        assert importlib.util.find_spec(name), f"there is no module {name}"
        return
    source = path.read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in source, f"{name} has no option {option}"


def _check_yaml(block: Block) -> None:
    """Write the file that the first line names, and check it if it is a recipe."""
    content, name = yaml.safe_load(block.text), _FILE.match(block.text)
    assert name, "the first line names the file, as in '# first.yaml'"
    if "base_model" in content:
        Path(name[1]).write_text(block.text, encoding="utf-8")
        load_recipe(name[1])
    elif "tasks" in content or "output_type" in content:
        # New tasks for an adapter, or one of the harness, which the code that names the file reads.
        Path(name[1]).parent.mkdir(exist_ok=True)
        Path(name[1]).write_text(block.text, encoding="utf-8")
    else:
        launched = ROOT / "examples" / "accelerate" / name[1]
        assert content == yaml.safe_load(launched.read_text(encoding="utf-8")), f"{launched} holds something else"


def _check_json(text: str) -> None:
    """One value, or one in each line."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        for line in text.splitlines():
            json.loads(line)


def _trained(namespace: dict[str, Any]) -> None:
    """A model with an adapter whose tasks differ, and its tokenizer."""
    _untrained(namespace)
    make_active(namespace["model"])


def _untrained(namespace: dict[str, Any]) -> None:
    """The same model, rows for it, and a collator of them."""
    config = HyperAdapterConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        tasks={"trec": "Classify what a question asks for.", "sms_spam": "Tell spam from genuine messages."},
    )
    namespace["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(CAUSAL), config)
    namespace["tokenizer"] = AutoTokenizer.from_pretrained(CAUSAL)
    namespace["rows"] = concatenate_tasks({task: _rows(namespace["tokenizer"]) for task in config.tasks}, config.tasks)
    namespace["collator"] = default_data_collator


def _examples(namespace: dict[str, Any]) -> None:
    """Rows of a new task for the page's model, which counts as trained."""
    make_active(namespace["model"])
    namespace["tokenizer"] = AutoTokenizer.from_pretrained(CAUSAL)
    namespace["examples"] = _rows(namespace["tokenizer"])


def _rows(tokenizer: Any) -> Dataset:
    tokens = tokenizer(["Is it good?", "Who are you", "Where is it"], return_tensors="pt")
    return Dataset.from_dict({**tokens, "labels": tokens["input_ids"]})


def _first(_: dict[str, Any]) -> None:
    """What examples.write_recipe writes to runs/first, of small data."""
    tasks = []
    for name, source in (("trec6", "trec"), ("sms_spam", "sms_spam")):
        splits = {split: load_dataset("json", data_files=f"{source}/{split}.jsonl", split="train") for split in SPLITS}
        labels = tuple(splits["train"].unique("label"))
        for split, rows in splits.items():
            ids = [labels.index(label) for label in rows["label"]]
            splits[split] = (
                rows.select_columns("text").add_column("text_pair", [None] * len(ids)).add_column("label", ids)
            )
        tasks.append(TextTask(name, (f"What {name} asks.",), labels, **splits))
        for split in SPLITS:
            write_rows(tasks[-1], split, 24, Path("runs/first", name, f"{split}.jsonl"))
    content = write_recipe.recipe(tasks, ENCODER, steps=15)
    Path("runs/first/recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def _loras(namespace: dict[str, Any]) -> None:
    """Folders with LoRAs."""
    for task in ("trec", "sms_spam"):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(CAUSAL), config).save_pretrained(f"loras/{task}")


def _zip(_: dict[str, Any]) -> None:
    """What the demo hands over."""
    minilm()
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    get_peft_model(load_base(2, seed=0), config).save_pretrained("zip/lora-5f2c1a9e")
    shutil.make_archive("lora-5f2c1a9e", "zip", "zip")


# What a page takes for granted, named in a comment before a block: variables, or files in the current folder.
_SETUPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "examples": _examples,
    "first": _first,
    "loras": _loras,
    "trained": _trained,
    "untrained": _untrained,
    "zip": _zip,
}
