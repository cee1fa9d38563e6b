"""What the installation has and lacks."""

from importlib import metadata

import pytest
import torch

from hyperadapt.normalization import gram
from hyperadapt_cli import doctor


def test_versions_are_those_that_are_installed() -> None:
    report = doctor.report()
    for name in ("torch", "peft", "transformers", "hyperadapt"):
        assert report["versions"][name] == metadata.version(name)
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert report["hub"]["offline"] is True


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_matplotlib(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_matplotlib)
    report = doctor.report()
    assert report["versions"]["matplotlib"] is None
    assert report["missing"]["matplotlib"] == {"without": "pictures", "remedy": 'pip install "hyperadapt[plot]"'}


@pytest.mark.parametrize("kernels", ["reference", None])
def test_the_kernels_named_are_the_kernels_used(monkeypatch: pytest.MonkeyPatch, kernels: str | None) -> None:
    if kernels is None:
        monkeypatch.delenv("HYPERADAPT_KERNELS", raising=False)
    else:
        monkeypatch.setenv("HYPERADAPT_KERNELS", kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    serves = gram.kernels_serve(torch.ones(1, 2, 4, 8, device=device))
    assert doctor.report()["kernels"]["used"] == ("triton" if serves else "torch")
