"""The method as PEFT sees it."""

import re
from pathlib import Path

import pytest
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from hyperadapt import HyperAdapterConfig, HyperAdapterModel
from hyperadapt.config.config import HyperAdapterType
from hyperadapt.plugin import register
from tests.support.helpers import run_python

KIND = HyperAdapterType.HYPERADAPTER
MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def test_name_and_prefix() -> None:
    assert KIND.value == KIND == "HYPERADAPTER"
    assert [mapping[KIND] for mapping in MAPPINGS] == [HyperAdapterConfig, HyperAdapterModel, "hyperadapter_"]
    # What is read from adapter_config.json is a plain string.
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HYPERADAPTER"] is HyperAdapterConfig
    assert HyperAdapterConfig().peft_type is KIND
    assert HyperAdapterModel.prefix == "hyperadapter_"


def test_config_is_found_by_peft(tmp_path: Path) -> None:
    config = HyperAdapterConfig(tasks=["one", "two"], r=5)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is HyperAdapterConfig
    assert loaded.peft_type is KIND
    assert (loaded.tasks, loaded.r) == (["one", "two"], 5)


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS]
    register()
    assert [dict(mapping) for mapping in MAPPINGS] == before


class Foreign:
    """Stands for another package's config."""


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, KIND, Foreign)
    message = f"The PEFT method name 'HYPERADAPTER' is taken by {Foreign.__module__}.Foreign."
    with pytest.raises(RuntimeError, match=re.escape(message)):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[KIND] is Foreign


def test_a_package_with_a_similar_name_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreign, "__module__", "hyperadapters.config")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, KIND, Foreign)
    with pytest.raises(RuntimeError, match=r"taken by hyperadapters\.config\.Foreign"):
        register()


def test_a_taken_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "OTHER", "hyperadapter_")
    with pytest.raises(RuntimeError, match="The parameter prefix 'hyperadapter_' is taken by another PEFT method"):
        register()


FRESH = """
import sys
import peft
members = list(peft.PeftType)
import hyperadapt
assert list(peft.PeftType) == members
assert "HYPERADAPTER" not in peft.PeftType.__members__
import hyperadapt.config.config, hyperadapt.tuner.model, hyperadapt.plugin
import importlib
for module in (hyperadapt.config.config, hyperadapt.tuner.layer, hyperadapt.tuner.model, hyperadapt.plugin, hyperadapt):
    importlib.reload(module)
import torch
model = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(4, 4)), hyperadapt.HyperAdapterConfig(target_modules=["0"])
)
assert type(model.base_model) is hyperadapt.HyperAdapterModel
model(torch.ones(2, 4), tasks="default").sum().backward()
"""


def test_importing_and_reloading_in_a_fresh_process() -> None:
    result = run_python(FRESH)
    assert result.stdout == ""
    # PEFT imports torchao where it is installed, which may complain about its own libraries.
    assert "hyperadapt" not in result.stderr
