"""transformers' pipeline and PEFT's auto classes with the labels of tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
    pipeline,
)

from hyperadapt import HyperAdapterConfig, LoraGenerator, export_lora, export_loras, use_tasks
from tests.support import tiny_runs
from tests.support.helpers import make_active

LABELS: dict[str, dict[int, str]] = {"topic": {0: "news", 1: "sport"}, "spam": {4: "spam", 0: "ham", 2: "unsure"}}
TEXTS = ["good a b", "bad", "c spam d e f", "ham yes"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_runs.save_base(folder, "SEQ_CLS")
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_runs.tokenizer("SEQ_CLS")


def classifier(base: Path, **changes: Any) -> PeftModel:
    made = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    config = HyperAdapterConfig(
        task_type="SEQ_CLS", **tiny_runs.ADAPTER, tasks=["topic", "spam", "bare"], task_labels=LABELS, **changes
    )
    return make_active(get_peft_model(made, config))


def expected(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str, task: str) -> dict[str, float]:
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt"), tasks=task).logits[0]
    own = sorted(LABELS[task])
    scores = logits[own].softmax(0).tolist()
    return {LABELS[task][output]: score for output, score in zip(own, scores, strict=True)}


def answers(given: list[Any]) -> list[dict[str, float]]:
    return [{one["label"]: one["score"] for one in row} for row in given]


@pytest.mark.parametrize("task", ["topic", "spam"])
def test_only_a_tasks_own_labels_compete(base: Path, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    model = classifier(base)
    with torch.no_grad():
        # An output of neither task, which would always win.
        model.base_model.model.classifier.modules_to_save["default"].bias[3] += 50
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    wanted = [pytest.approx(expected(model, tokenizer, text, task), rel=1e-5) for text in TEXTS]
    assert answers(pipe(TEXTS, tasks=task, top_k=None)) == wanted
    assert answers(pipe(TEXTS, tasks=task, top_k=None, batch_size=3)) == wanted
    with use_tasks(model, task):
        assert answers(pipe(TEXTS, top_k=None)) == wanted
    model.set_task(task)
    assert answers(pipe(TEXTS, top_k=None)) == wanted
    best = [max(one.expected, key=one.expected.get) for one in wanted]
    assert [one["label"] for one in pipe(TEXTS)] == best
    assert [one["label"] for one in pipe(TEXTS, tasks="bare")] == ["LABEL_3"] * len(TEXTS)
    fixed = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer, tasks=task)
    assert fixed(TEXTS[0], top_k=2)[0]["label"] == best[0]


def test_a_task_without_a_name_has_no_labels(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = classifier(base)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    with use_tasks(model, task_embeddings=torch.ones(8)):
        assert pipe(TEXTS[0], top_k=None)[0]["label"].startswith("LABEL_")


def test_merged_and_disabled_adapters(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = classifier(base)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    wanted = expected(model, tokenizer, TEXTS[0], "spam")
    model.set_task("spam")
    model.merge_adapter()
    assert answers([pipe(TEXTS[0], top_k=None)]) == [pytest.approx(wanted, rel=1e-4)]
    model.unmerge_adapter()
    model.set_task("topic")
    with use_tasks(model, "spam"):
        model.merge_adapter()
    assert answers([pipe(TEXTS[0], top_k=None)]) == [pytest.approx(wanted, rel=1e-4)]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert {one["label"] for one in pipe(TEXTS[0], top_k=None)} == {f"LABEL_{output}" for output in range(5)}


def test_what_a_pipeline_refuses(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = classifier(base)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    with pytest.raises(
        TypeError, match=re.escape("tasks=['spam', 'topic'] must be the name of one task, not list: a pip")
    ):
        pipe(TEXTS[:2], tasks=["spam", "topic"])
    with pytest.raises(ValueError, match=r"Unknown task 'other'\. Known tasks: "):
        pipe(TEXTS[0], tasks="other")
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    message = (
        "tasks='spam' is for a model with a hyperadapter, and BertForSequenceClassification has none. Leave it out."
    )
    with pytest.raises(ValueError, match=message):
        pipeline("text-classification", model=plain, tokenizer=tokenizer, tasks="spam")
    assert pipeline("text-classification", model=plain, tokenizer=tokenizer)(TEXTS[0])[0]["label"].startswith("LABEL_")


def test_an_adapter_finds_its_base_model(base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = classifier(base)
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == {0: "LABEL_0", 1: "sport", 2: "unsure", 3: "LABEL_3", 4: "spam"}
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(loaded(**inputs, tasks="spam").logits, model(**inputs, tasks="spam").logits)
    pipe = pipeline("text-classification", model=loaded, tokenizer=tokenizer)
    wanted = expected(model, tokenizer, TEXTS[0], "spam")
    assert answers([pipe(TEXTS[0], tasks="spam", top_k=None)]) == [pytest.approx(wanted, rel=1e-5)]
    # What the caller says comes first, and a head of another size is refused as ever.
    with pytest.raises((RuntimeError, ValueError), match="classifier"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


def test_a_plain_lora_is_loaded_as_before(base: Path, tmp_path: Path) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(str(tmp_path))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 2
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"


def test_tags_of_tokens_get_their_head_too(base: Path, tmp_path: Path) -> None:
    made = AutoModelForTokenClassification.from_pretrained(base, num_labels=7, ignore_mismatched_sizes=True)
    config = HyperAdapterConfig(
        task_type="TOKEN_CLS",
        **tiny_runs.ADAPTER,
        task_labels={"default": {0: "O", 6: "B-PER"}},
    )
    get_peft_model(made, config).save_pretrained(str(tmp_path))
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_labels, loaded.config.id2label[6]) == (7, "B-PER")


def test_a_file_cannot_ask_for_any_head(base: Path, tmp_path: Path) -> None:
    classifier(base).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["adapted_model"]["num_labels"] = 2**31 - 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_labels=2147483647 must be at most 65536"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_export_names_its_outputs(base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = classifier(base)
    export_lora(model, "spam", tmp_path / "spam")
    export_lora(model, "bare", tmp_path / "bare")
    assert not (tmp_path / "bare" / "config.json").exists()
    config = AutoConfig.from_pretrained(tmp_path / "spam")
    assert config.id2label == {0: "ham", 1: "sport", 2: "unsure", 3: "LABEL_3", 4: "spam"}
    assert config.label2id == {name: output for output, name in config.id2label.items()}
    assert "Its labels: `ham`, `unsure`, `spam`." in (tmp_path / "spam" / "README.md").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    lora = PeftModel.from_pretrained(plain, tmp_path / "spam").eval()
    found = pipeline("text-classification", model=lora, tokenizer=tokenizer)(TEXTS[0], top_k=None)
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS[0], return_tensors="pt"), tasks="spam").logits[0]
    scores = dict(zip(config.id2label.values(), logits.softmax(0).tolist(), strict=True))
    assert answers([found]) == [pytest.approx(scores, rel=1e-4)]


@pytest.mark.parametrize("way", ["export_lora", "export_loras", "save_all"])
def test_an_export_over_another_names_its_own_outputs(base: Path, tmp_path: Path, way: str) -> None:
    model = classifier(base)
    export_lora(model, "spam", tmp_path / "bare")
    if way == "export_lora":
        export_lora(model, "bare", tmp_path / "bare")
    elif way == "export_loras":
        export_loras(model, tmp_path, ["bare"])
    else:
        LoraGenerator.from_model(model).save_all(tmp_path, ["bare"])
    assert AutoConfig.from_pretrained(tmp_path / "bare").id2label == {at: f"LABEL_{at}" for at in range(5)}


def test_a_card_shows_labels(base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    model.set_labels("bare", {0: "a|b", 1: "<i>"})
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| task | description | labels |" in text
    assert "| `spam` |  | `ham`, `unsure`, `spam` |" in text
    assert r"| `bare` |  | `a\|b`, `<i>` |" in text
    assert 'print(classifier("What does the sun weigh?", tasks="topic"))' in text
