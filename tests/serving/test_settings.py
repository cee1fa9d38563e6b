"""Settings of the resolver in the environment."""

import json
from pathlib import Path

import pytest
from huggingface_hub import cached_assets_path

from hyperadapt.serving.settings import Settings
from tests.support.helpers import ROOT
from tests.support.served import PREFIX, SETTINGS


def read(**values: str) -> Settings | None:
    return Settings.read({PREFIX + name: value for name, value in values.items()})


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_nothing_is_served_unless_adapters_are_named(value: str) -> None:
    assert Settings.read({}) is None
    assert read(ADAPTERS=value) is None


def test_defaults() -> None:
    cache_dir = cached_assets_path("hyperadapt", "loras")
    assert read(ADAPTERS="user/a") == Settings({"user/a": "user/a"}, {}, None, cache_dir, 20 * 10**9)


def test_all_settings(tmp_path: Path) -> None:
    descriptions = {"genre": "Name the genre of a film.", "mood": ["Name the mood.", "How does it feel?"]}
    (tmp_path / "descriptions.json").write_text(json.dumps(descriptions))
    settings = read(
        ADAPTERS=" user/a, b = user/b@main/sub ,c=/data/c=d,",
        DESCRIPTIONS=str(tmp_path / "descriptions.json"),
        BASE_MODEL="Qwen/Qwen2.5-0.5B",
        CACHE_DIR=str(tmp_path / "cache"),
        CACHE_GB="0.5",
    )
    adapters = {"user/a": "user/a", "b": "user/b@main/sub", "c": "/data/c=d"}
    assert settings == Settings(adapters, descriptions, "Qwen/Qwen2.5-0.5B", tmp_path / "cache", 5 * 10**8)


def test_folders_in_the_home_folder() -> None:
    settings = read(ADAPTERS="a=~/a,b=~/b", CACHE_DIR="~/cache")
    assert settings is not None
    assert settings.adapters == {"a": str(Path.home() / "a"), "b": str(Path.home() / "b")}
    assert settings.cache_dir == Path.home() / "cache"


@pytest.mark.parametrize("entry", ["a=", "=user/a", "/data/a", "./a", "~/a", "a/=user/a"])
def test_an_adapter_without_a_name_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=f"{PREFIX}ADAPTERS holds '{entry}'.*name=folder"):
        read(ADAPTERS=f"user/b,{entry}")


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'a' more than once"):
        read(ADAPTERS="a=user/a,a=user/b")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "many"])
def test_a_bound_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"{PREFIX}CACHE_GB='{value}' must be a number above 0"):
        read(ADAPTERS="user/a", CACHE_GB=value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1]", "it holds \\[1\\]"), ('{"a": ""}', "task 'a' is ''"), ("{", "Expecting"), (None, "No such file")],
)
def test_descriptions_that_cannot_be_read_are_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "descriptions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"{PREFIX}DESCRIPTIONS='.*' is no JSON file .*{reason}"):
        read(ADAPTERS="user/a", DESCRIPTIONS=str(path))


def test_every_setting_is_documented() -> None:
    assert len(SETTINGS) == 5
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in SETTINGS)
