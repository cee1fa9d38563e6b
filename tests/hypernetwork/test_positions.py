"""Tests of layer index and module, as read from module names of real architectures, and of positions in files."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.positions import Position, positions_of, saved_positions, weight_count


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


NAMES = [
    *("embed", "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.2.k", "layers.2.q", "head"),
    # What would become another path, if its number were taken for a layer's.
    *("blocks.01.q", "blocks.١.q", "*.3.q", "x.*", "0", "1", "2"),
]


def config_of(positions: Sequence[Position], **changes: Any) -> HyperAdapterConfig:
    return HyperAdapterConfig(adapted_modules=json.loads(json.dumps(saved_positions(positions))), **changes)


def test_positions_are_saved_in_their_order() -> None:
    positions = [Position(name, 4, 3, 8) for name in NAMES]
    positions += [Position("layers.3.q", 4, 4, 8), Position("layers.4.q", 4, 3, 8), Position("layers.6.q", 4, 3, 8)]
    positions += [Position("words", 9, 4, 8, kind="Embedding", padding_idx=0), Position("c", 4, 3, 8, kind="Conv1D")]
    positions += [Position("conv.0", 18, 3, 8, kind="Convolution", kernel=(2, 3, 3))]
    config = config_of(positions)
    assert positions_of(config) == positions
    assert weight_count(config) == len(positions)


def test_ranks_and_scalings_follow_from_the_configuration() -> None:
    config = config_of(
        [Position(f"layers.{index}.{name}", 4, 3, 8) for index in range(2) for name in "qk"],
        r=8,
        rank_pattern={"layers.1.q": 2},
        alpha_pattern={"k": 4},
    )
    assert [(one.r, one.scaling) for one in positions_of(config)] == [(8, 1.0), (8, 0.5), (2, 4.0), (8, 0.5)]


def test_what_layers_share_is_saved_once() -> None:
    modules = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8, "up_proj": 16, "gate_proj": 16, "down_proj": 8}
    positions = [
        Position(f"model.layers.{index}.{name}", 8, size, 8) for index in range(80) for name, size in modules.items()
    ]
    [block] = saved_positions(positions)
    assert block["layers"] == [0, 79]
    assert len(json.dumps(block)) < 700
