"""One task is a folder, or a LoRA, that sentence-transformers loads by itself."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from hyperadapt import export_lora
from hyperadapt.sentence_transformers import add_hyperadapter, export_sentence_transformer
from tests.support.embedding_models import TEXTS, adapted, plain
from tests.support.helpers import adapter_config, run_python
from tests.support.tolerances import EXPORT_FLOAT32

ENCODE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
plain = SentenceTransformer(sys.argv[2], device="cpu")
plain.load_adapter(sys.argv[3])
for index, model in enumerate((SentenceTransformer(sys.argv[1], device="cpu"), plain)):
    np.save(f"{sys.argv[1]}/{index}.npy", model.encode(sys.argv[4].split(",")))
assert "hyperadapt" not in sys.modules
"""


def exported(model: SentenceTransformer, base: str, folder: Path) -> tuple[Path, Path, Path]:
    """Folders of the task "beta", of a plain model, and of the task's LoRA."""
    export_sentence_transformer(model, "beta", folder / "beta")
    plain(base).save_pretrained(str(folder / "plain"))
    export_lora(model.transformers_model, "beta", folder / "lora")
    return folder / "beta", folder / "plain", folder / "lora"


def test_exports_give_the_same_vectors(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    expected = model.encode(TEXTS, tasks="beta")
    folder, whole, lora = exported(model, base, tmp_path)
    loaded, other = (SentenceTransformer(str(path), device="cpu") for path in (folder, whole))
    other.load_adapter(str(lora))
    for one in (loaded, other):
        assert type(one[0]) is Transformer
        assert np.abs(one.encode(TEXTS) - expected).max() < EXPORT_FLOAT32
        assert np.abs(one.encode(TEXTS) - model.encode(TEXTS, tasks="alpha")).max() > 1e-2
    # The model still has all its tasks.
    assert np.array_equal(model.encode(TEXTS, tasks="beta"), expected)


@pytest.mark.slow
def test_exports_are_loaded_without_us(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    expected = model.encode(TEXTS, tasks="beta")
    run_python(ENCODE, *exported(model, base, tmp_path), ",".join(TEXTS))
    for index in range(2):
        assert np.abs(np.load(tmp_path / "beta" / f"{index}.npy") - expected).max() < EXPORT_FLOAT32


def test_what_cannot_be_exported(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown task 'delta'"):
        export_sentence_transformer(adapted(base), "delta", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    with pytest.raises(TypeError, match="is a Transformer, without a hyperadapter, so that there is no task"):
        export_sentence_transformer(plain(base), "beta", tmp_path)


def test_what_a_folder_holds_is_kept(base: str, tmp_path: Path) -> None:
    """As with export_lora, whose card an export has."""
    model = adapted(base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    export_sentence_transformer(model, "beta", tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    export_sentence_transformer(model, "beta", tmp_path / "new")
    assert f'PeftModel.from_pretrained(base_model, "{tmp_path / "new"}")' in (tmp_path / "new/README.md").read_text()
    model.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "file").write_text("mine")
    for name, message in (("saved", "holds a hyperadapter, which the LoRA would replace."), ("file", "is a file;")):
        with pytest.raises(ValueError, match=re.escape(f"directory={str(tmp_path / name)!r} {message}")):
            export_sentence_transformer(model, "beta", tmp_path / name)
    assert "HYPERADAPTER" in (tmp_path / "saved" / "adapter_config.json").read_text()


def test_an_untrained_task_is_noticed(base: str, tmp_path: Path) -> None:
    model = add_hyperadapter(plain(base), adapter_config(target_modules=["query"]))
    with pytest.warns(UserWarning, match=r"The exported update of \['beta'\] is all zero"):
        export_sentence_transformer(model, "beta", tmp_path)


def test_a_loaded_export_has_no_tasks(base: str, tmp_path: Path) -> None:
    export_sentence_transformer(adapted(base), "beta", tmp_path)
    with pytest.raises(ValueError, match="does not use"):
        SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, tasks="beta")
