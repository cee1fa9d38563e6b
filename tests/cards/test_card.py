"""Model cards: their metadata, what they say, and that their code runs as it is written."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hyperadapt import HyperAdapterConfig, diagnose, export_lora
from hyperadapt.cards.card import addressed, write_card
from hyperadapt.cards.lora_card import lora_card
from tests.support.card_schema import check_card, python_code
from tests.support.helpers import (
    TASK_TYPES,
    VOCABULARY,
    adapter_config,
    base_model,
    make_active,
    run_python,
)

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTIONS = {"alpha": "Find the topic.", "beta": ["Is it spam?", "Spam or not?"]}
KEPT = list((ROOT / "model_cards").glob("*.md"))
RESULTS = {"alpha": {"accuracy": 0.9, "loss": 0.25}, "beta": {"accuracy": 0.75, "loss": 0.5}}


def saved_base(name: str, folder: Path) -> str:
    """A base model in a folder, with a tokenizer that splits at spaces."""
    base_model(name).save_pretrained(folder)
    words = {f"word{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="word0", eos_token="word1")
    wrapped.save_pretrained(folder)
    return str(folder)


def named(name: str, path: str | None, **changes: Any) -> PeftModel:
    """An adapted model that says where its base model was loaded from."""
    base = base_model(name)
    base.config._name_or_path = base.name_or_path = path or ""
    config = adapter_config(target_modules="all-linear", task_type=TASK_TYPES[name], tasks=DESCRIPTIONS, **changes)
    return make_active(get_peft_model(base, config))


def test_a_complete_card(tmp_path: Path) -> None:
    model = named("llama", "Qwen/Qwen2.5-0.5B")
    write_card(
        model,
        tmp_path,
        results=RESULTS,
        training={"steps": 400, "learning_rate": 5e-3, "versions": {"torch": "2.13"}},
        diagnosis=diagnose(model),
        figures={"Cosines of the updates": "figures/cosines.png"},
        datasets=["stanfordnlp/imdb"],
        license="apache-2.0",
        language="en",
        tags=["mine"],
        limits=["English only."],
    )
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card)
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen2.5-0.5B", "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == ("hyperadapt", "text-generation", "apache-2.0")
    assert data.tags == ["hyperadapt", "hypernetwork", "multi-task", "peft", "mine"]
    assert {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results} == {
        (task, metric): value for task, metrics in RESULTS.items() for metric, value in metrics.items()
    }
    for text in (
        "| `beta` | Is it spam? | 0.750 | 0.500 |",
        "`soft_polar` (bound 0.5, warmup 1)",
        "- learning rate: 0.005",
        "- versions: torch 2.13",
        "![Cosines of the updates](figures/cosines.png)",
        "- English only.",
        "@software{hyperadapt",
    ):
        assert text in card.text, text
    norms = diagnose(model).task_norms
    assert f"| `alpha` | {float(norms[0]):.3g} | beta (" in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_text_alone_is_a_list_of_one(tmp_path: Path) -> None:
    facts = {"datasets": "user/ds", "tags": "mine", "limits": "One seed.", "labels": {"alpha": "spam"}}
    write_card(named("llama", "org/base"), tmp_path, **facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["user/ds"]
    assert card.data.tags == ["hyperadapt", "hypernetwork", "multi-task", "peft", "mine"]
    assert "\n- One seed.\n" in card.text
    assert "| `alpha` | Find the topic. | `spam` |" in card.text


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch(tmp_path: Path, number: Any) -> None:
    results = {"alpha": {"accuracy": number(0.5)}}
    write_card(named("llama", "org/base"), tmp_path, results=results, training={"learning_rate": number(0.25)})
    card = ModelCard.load(tmp_path / "README.md")
    assert [one.metric_value for one in card.data.eval_results] == [0.5]
    assert "| `alpha` | Find the topic. | 0.500 |" in card.text
    assert "- learning rate: 0.25\n" in card.text


def test_a_card_says_where_most_updates_are_at_their_bound(tmp_path: Path) -> None:
    texts = []
    for bound in (0.2, 100.0):
        model = named("bert", None, normalization_bound=bound, normalization="soft_frobenius")
        diagnosis = diagnose(model)
        write_card(model, tmp_path, overwrite=True, diagnosis=diagnosis)
        text = (tmp_path / "README.md").read_text()
        texts.append(text.partition("## Normalisation\n")[2].partition("\nShare that depends on the task")[0])
    assert "weight.\n\n100% of the updates are at their bound (90% of it or more). They would be larger" in texts[0]
    assert texts[0].endswith("raise normalization_bound.\n")
    assert "at their bound" not in texts[1]
    assert texts[1].endswith("weight.\n")


def test_the_code_of_a_card_runs_as_written(tmp_path: Path) -> None:
    plain, native = [], []
    for name in ("bert", "gpt2", "llama", "t5"):
        model = named(name, saved_base(name, tmp_path / name))
        adapter, lora = tmp_path / f"{name}-adapter", tmp_path / f"{name}-lora"
        model.save_pretrained(adapter)
        write_card(model, adapter, overwrite=True)
        export_lora(model, "beta", lora)
        for codes, folder, method in ((plain, lora, "LORA"), (native, adapter, "HYPERADAPTER")):
            [code] = python_code((folder / "README.md").read_text())
            codes.append(f"{code}\nassert model.peft_config['default'].peft_type.value == {method!r}\n")
    without_plugin = "import sys\nassert not any(name.startswith('hyperadapt') for name in sys.modules)\n"
    run_python("\n".join([*plain, without_plugin, *native]))


def test_a_folder_is_no_name_of_a_base_model(tmp_path: Path) -> None:
    write_card(named("bert", saved_base("bert", tmp_path / "base")), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    write_card(named("bert", str(tmp_path / "base")), tmp_path, overwrite=True, base_model="org/base")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/base"


def test_a_card_that_is_there_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n")
    write_card(named("llama", "Qwen/Qwen2.5-0.5B"), tmp_path)
    card = ModelCard.load(path)
    assert card.text.strip() == "# My own words"
    assert (card.data.license, card.data.base_model) == ("mit", "Qwen/Qwen2.5-0.5B")
    assert card.data.tags == ["mine", "hyperadapt", "hypernetwork", "multi-task", "peft"]
    before = path.read_bytes()
    write_card(named("llama", "Qwen/Qwen2.5-0.5B"), tmp_path)
    assert path.read_bytes() == before
    write_card(named("llama", "Qwen/Qwen2.5-0.5B"), tmp_path, overwrite=True)
    assert "My own words" not in path.read_text()


def test_several_processes_may_write_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, replace, written = named("llama", "org/base"), os.replace, []

    def replace_after_another(source: Path, target: Path) -> None:
        if not written:
            written.append(source)
            write_card(model, tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_another)
    write_card(model, tmp_path)
    assert written
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_text_cannot_break_out_of_its_place(tmp_path: Path) -> None:
    tasks = {"a|b`c<d": "x | y\n\n# no heading <script> ![picture](x.png) *loud*"}
    base = base_model("llama")
    config = HyperAdapterConfig(target_modules="all-linear", tasks=tasks, task_type="CAUSAL_LM")
    write_card(get_peft_model(base, config), tmp_path, results={"a|b`c<d": {"accuracy": 0.5}})
    text = (tmp_path / "README.md").read_text()
    assert "| `a\\|b'c<d` | x \\| y # no heading &lt;script> !\\[picture](x.png) \\*loud\\* |" in text
    assert "\n# no heading" not in text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].dataset_name == "a|b`c<d"


def test_many_tasks_are_abbreviated(tmp_path: Path) -> None:
    config = HyperAdapterConfig(target_modules="all-linear", tasks=[f"task{index}" for index in range(130)])
    write_card(get_peft_model(base_model("llama"), config), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`task99`" in text
    assert "`task100`" not in text
    assert "and 30 more tasks." in text


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HyperAdapterConfig(target_modules=["0"]))
    write_card(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert python_code(text) == []
    assert "base_model = ...  # made as for training" in text
    write_card(model, tmp_path, overwrite=True, usage="print('mine')")
    assert python_code((tmp_path / "README.md").read_text()) == ["print('mine')\n"]


def test_half_precision_is_kept_in_the_code(tmp_path: Path) -> None:
    base = base_model("llama").to(torch.bfloat16)
    base.config._name_or_path = base.name_or_path = "org/base"
    write_card(get_peft_model(base, adapter_config(target_modules="all-linear", task_type="CAUSAL_LM")), tmp_path)
    assert 'from_pretrained("org/base", dtype="bfloat16")' in (tmp_path / "README.md").read_text()


def test_errors_write_nothing(tmp_path: Path) -> None:
    model = named("llama", "org/base")
    with pytest.raises(ValueError, match=re.escape("results names ['gamma'], which are no tasks of the adapter.")):
        write_card(model, tmp_path, results={"gamma": {"accuracy": 1.0}})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        write_card(model, tmp_path, colour="red")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"results": [0.9]}, "results=[0.9] must be a mapping, not list."),
        (
            {"results": {"alpha": 0.9}},
            "results has 0.9 for task 'alpha', which is no mapping. Give each metric a number",
        ),
        ({"results": {"alpha": {"f1": "high"}}}, "results has f1='high' for task 'alpha', which is no number. Give"),
        (
            {"results": {"alpha": {"f1": torch.ones(2)}}},
            "results has f1=tensor([1., 1.]) for task 'alpha', which is no",
        ),
        ({"labels": ["spam"]}, "labels=['spam'] must be a mapping, not list."),
    ]
    for facts, message in wrong:
        with pytest.raises(TypeError, match=re.escape(message)):
            write_card(model, tmp_path, **facts)
    assert list(tmp_path.iterdir()) == []


def test_the_code_can_be_given_another_address(tmp_path: Path) -> None:
    write_card(named("llama", "org/base"), tmp_path)
    text = addressed((tmp_path / "README.md").read_text(), "me/adapter")
    assert 'PeftModel.from_pretrained(base_model, "me/adapter")' in text
    assert str(tmp_path) not in text


def test_programs_get_their_files_from_the_hub() -> None:
    config = adapter_config(task_type="CAUSAL_LM", base_model_name_or_path="org/base")
    local = {one: lora_card(config, "beta", [], "/home/me/a lora", one) for one in ("mlx", "gguf-ready", "diffusers")}
    download = "hf download me/lora --local-dir lora\n"
    nested = "hf download me/lora --include 'two/*' --local-dir lora\n"
    mlx, gguf = "mlx_lm.generate --model org/base --adapter-path", "python convert_lora_to_gguf.py --base"
    for format, published, below in (
        ("mlx", f"{download}{mlx} lora --prompt", f"{nested}{mlx} lora/two --prompt"),
        ("gguf-ready", f"{download}{gguf} lora lora\n", f"{nested}{gguf} lora/two lora/two\n"),
        ("diffusers", 'load_lora_weights("me/lora")', 'load_lora_weights("me/lora", subfolder="two")'),
    ):
        text = addressed(local[format], "me/lora")
        assert f"\n{published}" in text.replace("pipeline.", "")
        assert "/home/me" not in text
        # Also a card that was published before.
        assert addressed(addressed(local[format], "you/other"), "me/lora") == text
        assert f"\n{below}" in addressed(local[format], "me/lora", "two").replace("pipeline.", "")


@pytest.mark.parametrize("path", sorted(KEPT), ids=lambda path: path.stem)
def test_the_cards_that_are_kept(path: Path) -> None:
    card = ModelCard.load(path)
    check_card(card)
    assert card.data.base_model
    assert card.data.eval_results
    assert re.search(r"^- (command: python -m examples\.\w+|hardware: )", card.text, re.MULTILINE)
    assert "steps" in card.text
    assert "- versions: python " in card.text
    # Text alone: every run makes its pictures again.
    assert "![" not in card.text


def test_every_example_that_saves_an_adapter_has_a_card() -> None:
    sources = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    saving = {name for name, source in sources.items() if re.search(r"\bsave_\w*card\(", source)}
    assert {path.stem for path in KEPT} == saving | {"recipe"}
