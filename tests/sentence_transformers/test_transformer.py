"""Saved embedding models are loaded by SentenceTransformer, from folders and from the Hub."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from tests.support.embedding_models import TEXT_TASKS, TEXTS, adapted, plain
from tests.support.helpers import adapter_config, run_python, trainable
from tests.support.hub_server import HubServer

ENCODE = """
import sys
import hyperadapt
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[2], model.encode(sys.argv[3].split(","), tasks=sys.argv[4].split(",")))
"""


def test_a_fresh_process_loads_a_folder(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(str(tmp_path / "saved"))
    file = tmp_path / "vectors.npy"
    run_python(ENCODE, tmp_path / "saved", file, ",".join(TEXTS), ",".join(TEXT_TASKS))
    assert np.array_equal(np.load(file), model.encode(TEXTS, tasks=TEXT_TASKS))


def test_a_loaded_model_is_trained_further_and_saved_again(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    model.default_prompt_name = "beta"
    model.save_pretrained(str(tmp_path / "first"))
    loaded = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    assert trainable(loaded) == trainable(model)
    loaded.save_pretrained(str(tmp_path / "second"))
    again = SentenceTransformer(str(tmp_path / "second"), device="cpu")
    assert np.array_equal(again.encode(TEXTS, tasks=TEXT_TASKS), model.encode(TEXTS, tasks=TEXT_TASKS))
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS, tasks="beta"))
    # The base model is named, not included.
    assert not (tmp_path / "first" / "model.safetensors").exists()
    modules = json.loads((tmp_path / "second" / "modules.json").read_text())
    assert modules[0]["type"] == "hyperadapt.sentence_transformers.HyperAdapterTransformer"


def test_the_card_shows_how_to_name_a_task(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "import hyperadapt\nfrom sentence_transformers import SentenceTransformer\n" in card
    assert 'model.encode(sentences, tasks="alpha")' in card
    assert "- hyperadapter\n" in card
    # Loading does not add a second import.
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    loaded.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8").count("import hyperadapt") == 1


def test_only_the_adapter_that_is_loaded_again_is_saved(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    model.transformers_model.add_adapter("second", adapter_config(target_modules=["query"], tasks=["one"]))
    model.transformers_model.set_adapter("second")
    message = "active adapter is 'second', but a saved model is loaded with the one called 'default'. Call set_adapter"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_pretrained(str(tmp_path / "second"))
    assert not (tmp_path / "second" / "modules.json").exists()
    model.transformers_model.set_adapter("default")
    model.save_pretrained(str(tmp_path / "first"))
    loaded = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    assert np.array_equal(loaded.encode(TEXTS, tasks=TEXT_TASKS), model.encode(TEXTS, tasks=TEXT_TASKS))


def test_a_model_on_the_hub(hub: HubServer, base: str, tmp_path: Path) -> None:
    hub.add_repo("user/base", {path.name: path for path in Path(base).iterdir()})
    model = adapted("user/base")
    model.push_to_hub("user/embeddings", private=True)
    files = hub.files("user/embeddings")
    assert {"modules.json", "adapter_model.safetensors", "README.md", "1_Pooling/config.json"} <= set(files)
    loaded = SentenceTransformer("user/embeddings", device="cpu")
    assert np.array_equal(loaded.encode(TEXTS, tasks=TEXT_TASKS), model.encode(TEXTS, tasks=TEXT_TASKS))


def test_folders_without_a_hyperadapter_are_refused(base: str, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(str(tmp_path / "saved"))
    names = (tmp_path / "saved" / "modules.json").read_text()
    for other in ("base", "lora"):
        wrong = plain(base)
        if other == "lora":
            wrong.add_adapter(LoraConfig(target_modules=["query"]))
        wrong.save_pretrained(str(tmp_path / other))
        (tmp_path / other / "modules.json").write_text(names)
    with pytest.raises(ValueError, match=r"has no adapter_config.json, so that there is no hyperadapter to load"):
        SentenceTransformer(str(tmp_path / "base"), device="cpu")
    with pytest.raises(ValueError, match=r"an adapter of type .*LORA, not a hyperadapter. In its modules.json, name"):
        SentenceTransformer(str(tmp_path / "lora"), device="cpu")
