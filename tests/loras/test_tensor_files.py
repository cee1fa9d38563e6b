"""Files of tensors that share a header: the bytes of safetensors' own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperadapt.loras import tensor_files
from hyperadapt.loras.tensor_files import TensorFiles

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def tensors(seed: int, shift: int = 0) -> dict[str, Tensor]:
    """Of several dtypes and shapes, in an order that is not that of the file."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(), (3,), (2, 5 + shift), (0, 4)]
    return {
        f"{name}.{index}": (torch.randn(size, generator=generator) * 9).to(dtype)
        for name, dtype in zip("zaby", DTYPES, strict=True)
        for index, size in enumerate(sizes)
    }


def test_the_bytes_are_those_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, made = TensorFiles({"format": "pt"}), []
    monkeypatch.setattr(tensor_files, "save_file", lambda *one, **more: made.append(one) or save_file(*one, **more))
    for seed, shift in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 0)):
        state = tensors(seed, shift)
        files.write(state, tmp_path / "ours")
        save_file(state, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        loaded = load_file(tmp_path / "ours")
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    # A header is made where shapes change, and only there.
    assert len(made) == 3


def test_dtypes_and_names_are_told_apart(tmp_path: Path) -> None:
    files = TensorFiles({})
    for state in ({"a": torch.ones(2)}, {"b": torch.ones(2)}, {"b": torch.ones(2, dtype=torch.int32)}):
        files.write(state, tmp_path / "file")
        assert {name: value.dtype for name, value in load_file(tmp_path / "file").items()} == {
            name: value.dtype for name, value in state.items()
        }
