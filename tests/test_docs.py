"""The documentation: its code runs, its links lead somewhere, and it names everything that is public."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from peft import LoraConfig

import hyperadapt
import hyperadapt_cli as cli
from hyperadapt.recipes import TaskRecipe
from hyperadapt.recipes.schema import recipe_sections
from tests.support import lm_eval_standin
from tests.support.docs_pages import DOCS, PAGES, ROOT, anchors, blocks, links
from tests.support.docs_runner import commands, run
from tests.support.docs_standins import MINILM, save_models, write_data
from tests.support.helpers import minilm
from tests.support.hub_server import HubServer

IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
HARNESS = "hyperadapt.runs.harness"
OPTIONAL = {
    "hyperadapt.plots": ["matplotlib"],
    "hyperadapt.sentence_transformers": ["sentence_transformers"],
    "hyperadapt.trl": ["trl"],
    HARNESS: ["lm_eval"],
}
API = (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.filterwarnings(
    # Of a machine without an accelerator.
    "ignore:'pin_memory' argument is set as true but no accelerator is found",
    # TRL 1.16 uses names that transformers 5.23 deprecates.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    # Pages show an export without having trained before.
    "ignore:The exported update of .* is all zero",
)
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_code_of_a_page_runs(
    page: Path, hub: HubServer, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks(page)
    text = "".join(block.text for block in code)
    if MINILM in text:
        models = models | {MINILM: Path(minilm())}
    # The recipe that it writes has descriptions.
    needs = {"sentence_transformers": "examples.write_recipe"}
    for library in ("trl", "sentence_transformers", "matplotlib"):
        if library in text or needs.get(library, library) in text:
            pytest.importorskip(library, reason=f"{library} is not installed")
    for repo_id, folder in models.items():
        hub.add_repo(
            repo_id, {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        )
    if "lm_eval" in text:
        lm_eval_standin.install(monkeypatch)
        # Not what an installed lm_eval has registered.
        monkeypatch.delitem(sys.modules, HARNESS, raising=False)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in code:
        run(block, namespace, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.target.partition("#")
        if re.match(r"https?://", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}:{link.line} links to {link.target}, which does not exist"
        if anchor:
            assert anchor in anchors(path), f"{page.name}:{link.line} links to {link.target}, which has no such heading"
        if page.parent == DOCS and path.parent != DOCS:
            # Only pictures are taken into the site from elsewhere, by docs/hooks.py.
            assert path.suffix == ".svg", f"{page.name}:{link.line} links to {link.target}, outside of the site"


def files(navigation: list[Any]) -> Iterator[str]:
    for entry in navigation:
        for target in entry.values():
            yield from files(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_navigation() -> None:
    # Python tags aside, which only MkDocs reads.
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files(navigation)) == sorted(path.name for path in DOCS.glob("*.md"))


def directives() -> list[str]:
    return re.findall(r"^::: (\S+)$", API, re.MULTILINE)


@pytest.mark.parametrize("name", directives())
def test_every_entry_of_the_reference_has_a_docstring(name: str) -> None:
    module, parts = name, []
    for needed in OPTIONAL.get(name, []):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    while True:
        try:
            found: Any = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, part = module.rpartition(".")
            parts.insert(0, part)
    for part in parts:
        found = getattr(found, part)
    assert inspect.getdoc(found)


@pytest.mark.parametrize("name", hyperadapt.__all__)
def test_the_reference_names_everything_public(name: str) -> None:
    assert f"hyperadapt.{name}" in directives()


def test_migration_names_every_field_of_lora() -> None:
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    assert [field.name for field in dataclasses.fields(LoraConfig) if f"`{field.name}`" not in page] == []


def test_every_command_option_and_field_is_described() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(cli.app).commands
    names = [
        *(f"hyperadapt {name} " for name in commands),
        *(option for command in commands.values() for parameter in command.params for option in parameter.opts[:1]),
    ]
    assert [name for name in names if name.startswith(("-", "hyper")) and name not in page] == []
    # Those of TrainingArguments are described by transformers.
    sections = [section for name, section in recipe_sections(Path(), True).items() if name != "training"]
    fields = [*TaskRecipe.__dataclass_fields__, *(name for section in sections for name in section.checks)]
    assert [name for name in fields if f"`{name}`" not in page] == []


def test_the_site_can_be_built(tmp_path: Path) -> None:
    for package in ("mkdocs", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = "# first\npip install a && pip install b  # both\n\nhyperadapt train \\\n    first.yaml\n"
    assert commands(text) == ["pip install a", "pip install b", "hyperadapt train      first.yaml"]


WRONG = {
    ("sh", "ls"): "the language 'sh' is not known",
    ("", "a"): "the language '' is not known",
    ("python", "x = 1\ny"): "name 'y' is not defined",
    ("bash", "rm -r runs"): "'rm -r runs' is neither run nor on the list",
    ("bash", 'pip install "hyperadapt[nothing]"'): "names an unknown extra",
    ("bash", "pip install -r nothing.txt"): "nothing.txt does not exist",
    ("bash", "python -m examples.nothing"): "No module|no module",
    ("bash", "python -m examples.quickstart --nothing 1"): "examples.quickstart has no option --nothing",
    ("bash", "python examples/nothing.py"): "No module|no module",
    ("bash", "accelerate launch --config_file nothing.yaml -m examples.quickstart"): "nothing.yaml",
    ("bash", "hyperadapt train nothing.yaml"): "'hyperadapt train nothing.yaml' exited with 2",
    ("yaml", "a: 1"): "the first line names the file",
    ("yaml", "# fsdp2.yaml\nnum_processes: 2"): "fsdp2.yaml holds something else",
    ("yaml", "# a.yaml\nbase_model: a/b\noutput: c"): "a.yaml:3: output is no field",
    ("json", '{"a": 1}\n{'): "Expecting property name",
}


@pytest.mark.parametrize(("language", "text"), WRONG, ids=lambda value: value[:40])
def test_what_is_wrong_in_a_page_is_found(
    language: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```{language}\n{text}\n```\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [block] = blocks(page)
    with pytest.raises(
        (ValueError, NameError, AssertionError, ModuleNotFoundError), match=WRONG[language, text]
    ) as error:
        run(block, {}, monkeypatch)
    assert error.value.__notes__ == [f"in the {language} block at page.md:3"]


def test_headings_and_fences_that_readers_could_not_use_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n## A - b\n\n    indented = True\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page.md:3: the heading 'A - b' has no anchor of its own"):
        anchors(page)
    with pytest.raises(ValueError, match=r"page.md:5: code without a fence"):
        blocks(page)


def test_what_works_has_an_example_and_tests() -> None:
    """The table on the first page."""
    section = (DOCS / "index.md").read_text(encoding="utf-8").partition("## What works")[2].partition("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.strip().splitlines()[2:]]
    assert len(rows) == 8
    for _, _, example, held in rows:
        assert (ROOT / "examples" / f"{example.strip('`')}.py").is_file(), example
        assert (ROOT / held.strip("`")).is_file(), held
