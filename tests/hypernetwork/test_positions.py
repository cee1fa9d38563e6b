"""Tests of layer index and module, as read from module names of real architectures."""

import pytest

from hyperadapt.hypernetwork.positions import Position


@pytest.mark.parametrize(
    ("name", "layer_index", "module"),
    [
        # BERT, GPT-2, Llama
        (
            "bert.encoder.layer.11.attention.self.query",
            11,
            "bert.encoder.layer.*.attention.self.query",
        ),
        ("transformer.h.3.attn.c_attn", 3, "transformer.h.*.attn.c_attn"),
        ("model.layers.0.mlp.down_proj", 0, "model.layers.*.mlp.down_proj"),
        # T5: encoder and decoder are different modules; the sublayer's number stays.
        (
            "encoder.block.2.layer.0.SelfAttention.q",
            2,
            "encoder.block.*.layer.0.SelfAttention.q",
        ),
        (
            "decoder.block.2.layer.0.SelfAttention.q",
            2,
            "decoder.block.*.layer.0.SelfAttention.q",
        ),
        (
            "decoder.block.2.layer.1.EncDecAttention.q",
            2,
            "decoder.block.*.layer.1.EncDecAttention.q",
        ),
        # Mixture of experts: the first number is the layer, the expert's stays.
        ("layers.1.experts.0.w1", 1, "layers.*.experts.0.w1"),
        ("layers.1.experts.7.w1", 1, "layers.*.experts.7.w1"),
        # Outside of layers.
        ("lm_head", None, "lm_head"),
        ("classifier.dense", None, "classifier.dense"),
        # Numbers alone, and at either end (nn.Sequential).
        ("0", 0, "*"),
        ("2.linear", 2, "*.linear"),
        ("block.4", 4, "block.*"),
        ("0.1.2", 0, "*.1.2"),
        # Digits inside words are no layer.
        ("fc1", None, "fc1"),
        ("transformer.layer.5.ffn.lin1", 5, "transformer.layer.*.ffn.lin1"),
        ("conv2d.lin0", None, "conv2d.lin0"),
        ("down_blocks2.6.fc2", 6, "down_blocks2.*.fc2"),
        ("1st.w3.2", 2, "1st.w3.*"),
    ],
)
def test_layer_index_and_module(name: str, layer_index: int | None, module: str) -> None:
    position = Position(name, in_features=4, out_features=3, r=2)
    assert position.layer_index == layer_index
    assert position.module == module


def test_positions_are_equal_and_hashable_by_value() -> None:
    assert Position("a.0.b", 4, 3, 2) == Position("a.0.b", 4, 3, 2)
    assert len({Position("a.0.b", 4, 3, 2), Position("a.0.b", 4, 3, 2), Position("a.1.b", 4, 3, 2)}) == 2
