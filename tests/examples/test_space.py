"""The demo without its page: what is trained and measured, asked, drawn and handed over."""

import json
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from peft import PeftModel

from examples.space.answers import answers_table, expectation
from examples.space.facts import Concept, Facts, Score
from examples.space.inputs import checked_concept, checked_description, checked_texts
from examples.space.pictures import TaskMap, draw_sizes
from examples.space.reader import Reader
from examples.space.train import BASE
from examples.support.encoder import load_base, load_tokenizer
from tests.support.demo import trained_demo
from tests.support.helpers import ROOT
from tests.support.tolerances import FLOAT32_DIFFERENCE

TEXTS = ["Shares of the company rose by a tenth.", "The team won the cup."]
UNSEEN = "Is it about money?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(folder)


def test_the_command_writes_an_adapter_of_the_upper_layers_and_what_it_scores(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == BASE
    assert config["layers_to_transform"] == [3, 4, 5]
    facts = Facts.load(folder)
    assert [concept.is_trained for concept in facts.concepts] == [True, True, True, False, False]
    assert {concept.corpus for concept in facts.concepts} == {"articles"}
    for score, concepts in ((facts.trained, 3), (facts.unseen, 2)):
        assert score is not None
        assert score.concepts == concepts
        assert 0 <= min(score.own, score.other) <= max(score.own, score.other) <= 1


def test_an_adapter_that_is_missing_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no adapter in {tmp_path}. Train it: python -m examples")):
        Reader(tmp_path)


def test_the_zip_holds_a_lora_that_answers_the_same_in_plain_peft(reader: Reader, tmp_path: Path) -> None:
    path = reader.write_lora(UNSEEN, tmp_path / "lora")
    assert path == tmp_path / "lora.zip"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    lora = PeftModel.from_pretrained(load_base(2, seed=1), tmp_path / "lora").eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    batch = load_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = lora(**batch).logits.softmax(-1)[:, 1]
    assert reader.yes(TEXTS, UNSEEN) == pytest.approx(expected.tolist(), abs=FLOAT32_DIFFERENCE)
    # What is drawn is what merging changes.
    before = load_base(2, seed=1).state_dict()
    after = lora.merge_and_unload().state_dict()
    sizes = {
        name.removesuffix(".weight"): float((after[name] - weight).norm() / weight.norm())
        for name, weight in before.items()
        if name.endswith(".weight") and not torch.equal(after[name], weight) and "classifier" not in name
    }
    assert reader.update_sizes(UNSEEN) == pytest.approx(sizes, rel=1e-3)


def test_descriptions_matter_and_the_control_is_another_ones(reader: Reader) -> None:
    descriptions = [concept.description for concept in reader.facts.concepts]
    for description in (*descriptions, UNSEEN):
        control = reader.control(description)
        assert control == reader.control(description) != description
        assert control in descriptions
        assert reader.yes(TEXTS, description) != reader.yes(TEXTS, control)


def test_long_texts_are_cut(reader: Reader) -> None:
    start = " ".join(["word"] * 46)
    assert reader.yes([f"{start} more and more"], UNSEEN) == pytest.approx(reader.yes([start], UNSEEN), abs=1e-6)


def test_the_map_has_a_star_where_the_task_lies(reader: Reader) -> None:
    concepts = [concept for concept in reader.facts.concepts if concept.is_trained]
    embeddings = reader.trained_embeddings()
    task_map = TaskMap(concepts, embeddings)
    for concept, embedding in zip(concepts, embeddings, strict=True):
        assert task_map.nearest(embedding)[0] == concept
    points, star = task_map.draw(embeddings[1]).axes[0].collections
    assert star.get_offsets()[0].tolist() == pytest.approx(points.get_offsets()[1].tolist(), abs=1e-6)


def test_every_module_has_a_bar_of_its_size() -> None:
    sizes = {
        f"bert.encoder.layer.{layer}.attention.self.{name}": layer + len(name) for layer in (4, 5) for name in "qk"
    }
    axes = draw_sizes(sizes).axes[0]
    assert sorted(bar.get_width() for bar in axes.patches) == sorted(sizes.values())
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q", "k"]


def test_what_visitors_write_is_shown_as_they_wrote_it() -> None:
    table = answers_table(["<b>"], "a & b", [0.75], "c", [0.125], [Concept("x/y", "<d>", True)])
    assert "<td>&lt;b&gt;</td>" in table
    assert "“a &amp; b”" in table
    assert "“&lt;d&gt;”" in table
    assert re.findall(r'"(yes|no)">\1</span> (\d+%)', table) == [("yes", "75%"), ("no", "88%")]


def test_what_to_expect_is_what_was_measured() -> None:
    text = expectation(Facts(24, [], Score(34, 0.62, 0.49), Score(115, 0.72, 0.51)))
    assert "72% of cases for\n115 trained concepts, and in 62% for 34 that" in text
    assert "51% and 49%" in text


def test_the_space_is_described_as_the_hub_wants_it() -> None:
    space = ROOT / "examples" / "space"
    _, front, _ = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [gradio] = [one for one in map(Requirement, extras["demo"]) if one.name == facts["sdk"]]
    assert gradio.specifier.contains(facts["sdk_version"])
    assert (space / facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ours, weights = [Requirement(line) for line in lines if not line.startswith("#")]
    assert (ours.name, ours.extras) == ("hyperadapt", {"demo"})
    assert str(weights) in (ROOT / "examples" / "requirements.txt").read_text(encoding="utf-8").splitlines()


CONCEPTS = [Concept("articles/tech", "The article is about technology.", True)]
MISTAKES = [
    (lambda: checked_texts(" \n "), "There is no text. Type at least one, a line for each"),
    (lambda: checked_texts("a\n" * 13), "There are 13 texts. Give at most 12"),
    (lambda: checked_texts("a\n" + "b" * 401), "Text 2 has 401 characters. Shorten it to at most 400"),
    (lambda: checked_description("  "), "There is no description. Say what shall be decided"),
    (lambda: checked_description("a" * 201), "The description has 201 characters. Shorten it to at most 200"),
    (lambda: checked_description("123 ?!"), "“123 \\?!” has no word. Describe the task in words"),
    (lambda: checked_concept(None, CONCEPTS), "No task is chosen. Choose one from the list, or describe one"),
    (lambda: checked_concept("a/b", CONCEPTS), "“a/b” is no task of the bank. Choose one from the list"),
]


@pytest.mark.parametrize(("check", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_mistakes_are_told_with_what_to_do(check: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check()


def test_what_is_right_is_taken() -> None:
    assert checked_texts(" a \n\nb\n") == ["a", "b"]
    assert checked_description(" Is it\nred? ") == "Is it red?"
    assert checked_concept("articles/tech", CONCEPTS) is CONCEPTS[0]
