"""An export that changes nothing is told, whichever way it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperadapt import LoraGenerator, export_lora, export_loras
from tests.support.helpers import adapted_model, make_active

ONE = (
    r"^The exported update of \['alpha'\] is all zero, so it leaves the base model as it is\. The adapter is "
    r"untrained: train it, or load its weights, and export again\.$"
)


def test_updates_of_zero_are_told_once_a_call(tmp_path: Path) -> None:
    model = adapted_model("llama", active=False)
    model.save_pretrained(tmp_path / "adapter")
    generator = LoraGenerator.from_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=ONE):
        export_lora(model, "alpha", tmp_path / "one")
    with pytest.warns(UserWarning, match=ONE):
        generator.save("alpha", tmp_path / "one")
    with pytest.warns(UserWarning, match=r"of \['alpha', 'beta'\] is all zero") as told:
        export_loras(model, tmp_path / "two", ["alpha", "beta"])
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"of \['alpha', 'beta', 'gamma'\] is all zero") as told:
        generator.save_all(tmp_path / "all")
    assert len(told) == 1


def test_other_updates_are_not(tmp_path: Path) -> None:
    # A warning would be an error.
    export_lora(make_active(adapted_model("llama", active=False)), "alpha", tmp_path / "one")
