"""Cards of exported LoRAs, which speak of no hyperadapt."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hyperadapt import export_lora
from hyperadapt.cards.lora_card import lora_card
from tests.support.card_schema import check_card
from tests.support.helpers import adapted_model


@pytest.mark.parametrize(
    ("format", "library", "text"),
    [
        ("peft", "peft", "PeftModel.from_pretrained(base_model,"),
        ("gguf-ready", "peft", "convert_lora_to_gguf.py --base "),
        ("mlx", "mlx", "mlx_lm.generate --model org/base --adapter-path"),
        ("diffusers", "diffusers", "pipeline.load_lora_weights("),
    ],
)
def test_cards_of_exports(tmp_path: Path, format: str, library: str, text: str) -> None:
    model = adapted_model("llama", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = "org/base"
    written = lora_card(model.peft_config["default"], "beta", ["Is it spam?"], "lora", format)
    card = ModelCard(written)
    # As the Hub's own library writes it.
    assert str(card) == written
    check_card(card)
    assert (card.data.library_name, card.data.base_model) == (library, "org/base")
    assert text in card.text
    assert "Is it spam?" in card.text
    assert "import hyperadapt" not in card.text


def test_the_card_of_an_export_follows_its_task(tmp_path: Path) -> None:
    model = adapted_model("llama", tasks={"alpha": "find the topic", "beta": "is it spam"})
    for task, description in model.peft_config["default"].task_descriptions.items():
        export_lora(model, task, tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert f"Exported from task `{task}`" in text
        assert description in text
        assert str(tmp_path) in text
    (tmp_path / "README.md").write_bytes(b"mine \xff")
    export_lora(model, "alpha", tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"mine \xff"
