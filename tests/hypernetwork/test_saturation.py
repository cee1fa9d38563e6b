"""Which updates are at their bound: by layer, in words, and where that is many."""

import pytest

from hyperadapt.hypernetwork.saturation import Saturation


def test_shares_are_means_over_the_positions_of_a_layer() -> None:
    saturation = Saturation.of({"h.0.q": 1.0, "h.0.up": 0.5, "h.11.q": 0.0, "classifier": 0.1})
    assert saturation.share == pytest.approx(0.4)
    assert saturation.layers == {"layer_0": 0.75, "layer_11": 0.0, "no_layer": 0.1}


@pytest.mark.parametrize(
    ("layers", "most"),
    [
        ({"layer_0": 0.4, "layer_1": 0.9}, ", most in layer_1 (90%)"),
        # Those that stand out, at most three.
        (
            {"layer_0": 0, "layer_1": 0.7, "layer_2": 1, "layer_3": 0.8, "layer_4": 0.9},
            ", most in layer_2 (100%), layer_4 (90%), layer_3 (80%)",
        ),
        ({"layer_0": 0.5, "layer_1": 0.5}, ""),
        ({"layer_0": 0.0, "layer_1": 0.0}, ""),
    ],
)
def test_words_name_the_layers_above_the_others(layers: dict[str, float], most: str) -> None:
    share = sum(layers.values()) / len(layers)
    expected = f"{share:.0%} of the updates are at their bound (90% of it or more){most}"
    assert str(Saturation(share, layers)) == expected


@pytest.mark.parametrize(("share", "is_high"), [(0.0, False), (0.5, False), (0.51, True), (1.0, True)])
def test_most_are_more_than_half(share: float, is_high: bool) -> None:
    assert Saturation(share, {}).is_high is is_high
