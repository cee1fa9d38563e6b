"""One task is a folder, or a LoRA, that sentence-transformers loads by itself."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

from sentence_transformers import SentenceTransformer

from hyperadapt import export_lora
from hyperadapt.sentence_transformers import export_sentence_transformer
from tests.support.embedding_models import TEXTS, adapted, plain
from tests.support.helpers import run_python
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


def test_exports_give_the_same_vectors_without_us(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    expected = model.encode(TEXTS, tasks="beta")
    export_sentence_transformer(model, "beta", tmp_path / "beta")
    export_lora(model.transformers_model, "beta", tmp_path / "lora")
    plain(base).save_pretrained(str(tmp_path / "plain"))
    run_python(ENCODE, tmp_path / "beta", tmp_path / "plain", tmp_path / "lora", ",".join(TEXTS))
    for index in range(2):
        exported = np.load(tmp_path / "beta" / f"{index}.npy")
        assert np.abs(exported - expected).max() < EXPORT_FLOAT32
        assert np.abs(exported - model.encode(TEXTS, tasks="alpha")).max() > 1e-2
    # The model still has all its tasks.
    assert np.array_equal(model.encode(TEXTS, tasks="beta"), expected)


def test_what_cannot_be_exported(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown task 'delta'"):
        export_sentence_transformer(adapted(base), "delta", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    with pytest.raises(TypeError, match="is a Transformer, without a hyperadapter, so that there is no task"):
        export_sentence_transformer(plain(base), "beta", tmp_path)


def test_a_loaded_export_has_no_tasks(base: str, tmp_path: Path) -> None:
    export_sentence_transformer(adapted(base), "beta", tmp_path)
    with pytest.raises(ValueError, match="does not use"):
        SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, tasks="beta")
