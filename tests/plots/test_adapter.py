"""Pictures of an adapter: the numbers in them against dense updates."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from tests.support.helpers import TASKS, adapted_model, base_weights, letters, two_adapters
from tests.support.tolerances import EPS_FLOAT32, FLOAT64_EXACT

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperadapt.plots import draw

EXACT = {"rtol": FLOAT64_EXACT, "atol": FLOAT64_EXACT}
# Norms of base weights are kept in float32.
SINGLE = {"rtol": 8 * EPS_FLOAT32, "atol": 0.0}
NAMES = ["task_map", "singular_values", "update_norms", "cosines", "training"]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def main_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def title(figure: Figure) -> str:
    return main_axes(figure).get_title(loc="left")


def matrix(figure: Figure) -> Tensor:
    """The numbers of a heat map; NaN where they are masked."""
    values = main_axes(figure).images[0].get_array()
    return torch.from_numpy(np.ma.filled(values, np.nan))


def tick_names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def lines(axes: Axes) -> dict[str, Tensor]:
    """Points, of shape (2, n), by name in the legend."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): torch.tensor(line.get_xydata().T.copy(), dtype=torch.float64) for line in named}


def factors_of(model: PeftModel) -> dict[str, Any]:
    network = model.base_model.router.network("default")
    with torch.no_grad():
        return network(torch.arange(len(network.config.task_names)))


def base_norms(model: PeftModel) -> dict[str, Tensor]:
    weights = base_weights(model)
    return {name: weights[f"{name}.weight"].norm() for name in factors_of(model)}


@pytest.mark.parametrize(
    ("options", "scaling"),
    [({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}, 2), ({"normalization": "whitening"}, 1)],
)
def test_singular_values_are_those_of_dense_updates(options: dict[str, Any], scaling: float) -> None:
    model = adapted_model("llama", **options).double()
    axes = main_axes(draw(model)["singular_values"])
    norms = base_norms(model)
    for name, start in (("before normalisation: B·A", "before"), ("after normalisation: ΔW", "after")):
        means = torch.full((len(norms), 4), torch.nan, dtype=torch.float64)
        for row, (position, factors) in zip(means, factors_of(model).items(), strict=True):
            dense = factors.delta_weight() if start == "after" else scaling * factors.lora_B @ factors.lora_A
            r = factors.lora_A.shape[-2]
            row[:r] = torch.linalg.svdvals(dense)[:, :r].mean(0) / norms[position]
        x, y = lines(axes)[name]
        assert x.tolist() == [1, 2, 3, 4]
        assert_close(y, torch.from_numpy(np.nanmedian(means.numpy(), axis=0)), **SINGLE)
        (line,) = [line for line in axes.lines if line.get_label() == name]
        bounds = [
            other.get_ydata() for other in axes.lines if other.get_color() == line.get_color() and other is not line
        ]
        assert_close(
            torch.tensor(np.array(bounds)), torch.tensor(np.array([np.nanmin(means, 0), np.nanmax(means, 0)])), **SINGLE
        )
    assert axes.get_yscale() == "log"
    assert "mean of 3 tasks: median and range over 14 positions" in axes.get_title(loc="left")


def test_norms_stand_by_module_and_layer() -> None:
    model = adapted_model("llama").double()
    figure = draw(model, tasks=["gamma", "alpha"])["update_norms"]
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    groups = ["self_attn"] * 4 + ["mlp"] * 3
    names = [
        f"model.layers.{layer}.{group}.{name}" for group, name in zip(groups, modules, strict=True) for layer in (0, 1)
    ]
    factors, norms = factors_of(model), base_norms(model)
    expected = torch.stack([factors[name].delta_weight().flatten(1).norm(dim=1) / norms[name] for name in names], dim=1)
    assert_close(matrix(figure), expected[[2, 0]], **SINGLE)
    axes = main_axes(figure)
    assert tick_names(axes.xaxis) == modules
    assert axes.get_xticks().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5]
    assert tick_names(axes.yaxis) == ["gamma", "alpha"]
    assert axes.get_xlabel() == "module; within each, layers 0 to 1 from left to right"
    assert figure.axes[1].get_ylabel() == "‖ΔW‖ / ‖W₀‖"


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (
            "bert",
            ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
        ),
        ("t5", [f"encoder…SelfAttention.{name}" for name in "qkvo"]),
    ],
)
def test_modules_are_named_by_what_tells_them_apart(base: str, names: list[str]) -> None:
    axes = main_axes(draw(adapted_model(base))["update_norms"])
    found = tick_names(axes.xaxis)
    assert found[: len(names)] == names
    assert len(set(found)) == len(found)
    assert all(label.get_rotation() == 45 for label in axes.get_xticklabels())


def test_layers_that_are_not_the_same_everywhere_are_not_numbered() -> None:
    target = [Q_PROJ, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    axes = main_axes(draw(adapted_model("llama", target_modules=target))["update_norms"])
    assert axes.get_xlabel() == "module; within each, its layers from left to right"


def test_cosines_are_those_of_dense_updates() -> None:
    model = adapted_model("llama").double()
    figure = draw(model)["cosines"]
    flat = torch.cat([factors.delta_weight().flatten(1) for factors in factors_of(model).values()], dim=1)
    expected = flat @ flat.T / flat.norm(dim=1).outer(flat.norm(dim=1))
    assert_close(matrix(figure), expected, **EXACT)
    axes = main_axes(figure)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (column, row): f"{expected[row, column]:.2f}" for row in range(3) for column in range(3)
    }
    assert tick_names(axes.xaxis) == tick_names(axes.yaxis) == TASKS
    assert axes.images[0].get_clim() == (-1, 1)
    share = (flat - flat.mean(0)).square().sum() / flat.square().sum()
    assert title(figure) == f"Cosines between the tasks' updates; the task explains {share:.0%} of them"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task_embedding": "text", "text_encoder": letters, "tasks": {name: f"this is {name}" for name in "abcd"}},
        {"task_embedding": "both", "text_encoder": letters, "tasks": {name: [name, f"also {name}"] for name in "abcd"}},
        {"normalization": "adaptive"},
        {"normalization": "sinkhorn", "head": "row"},
        {"task_embedding_dim": 1},
    ],
)
def test_the_map_shows_the_directions_of_any_embedding(options: dict[str, Any]) -> None:
    model = adapted_model("llama", **options).train()
    embedding = model.base_model.router.network("default").task_embedding
    if embedding.weight is not None:
        # Of a single dimension, directions differ in the sign alone.
        embedding.weight.data[0] *= -1
    figures = draw(model)
    assert list(figures) == NAMES[:4]
    axes = main_axes(figures["task_map"])
    names = list(options.get("tasks", TASKS))
    with torch.no_grad():
        vectors = embedding.eval()(torch.arange(len(names))).double()
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    centred = directions - directions.mean(0)
    values, axes_of_variance = torch.linalg.eigh(centred.T @ centred)
    expected = torch.nn.functional.pad(centred @ axes_of_variance.flip(1)[:, :2], (0, 1))[:, :2]
    points = torch.tensor(axes.collections[0].get_offsets().data)
    # The roots of rounded squares; signs are free.
    assert_close(points.abs(), expected.abs(), rtol=1e-6, atol=1e-7)
    assert_close(points @ points.T, expected @ expected.T, rtol=1e-6, atol=1e-7)
    assert [text.get_text() for text in axes.texts] == names
    assert [text.xy for text in axes.texts] == [tuple(point) for point in points.tolist()]
    shares = values.flip(0) / values.sum()
    assert axes.get_xlabel() == f"first principal component ({shares[0]:.0%} of the variance)"


@pytest.mark.parametrize("upper", [0, 1])
def test_names_of_near_tasks_do_not_meet(upper: int) -> None:
    model = adapted_model("llama", tasks=["product_sent", "film_sent", "trec", "spam"], task_embedding_dim=3)
    with torch.no_grad():
        weight = model.base_model.router.network("default").task_embedding.weight
        weight.copy_(torch.tensor([[-1, 0, 1], [-1, 0, 1], [1, 0, 1], [0, 2, 1.0]]))
        weight[1 - upper] += torch.tensor([0.03, -0.07, 0])
    figure = draw(model)["task_map"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in main_axes(figure).texts]
    assert len(boxes) == 4
    assert not boxes[0].overlaps(boxes[1])


def test_embeddings_without_any_difference_lie_on_one_point() -> None:
    model = adapted_model("llama")
    with torch.no_grad():
        model.base_model.router.network("default").task_embedding.weight.fill_(0.3)
    figures = draw(model)
    axes = main_axes(figures["task_map"])
    assert not axes.collections[0].get_offsets().any()
    assert axes.get_xlabel().endswith("(0% of the variance)")
    assert title(figures["cosines"]).endswith("the task explains 0% of them")


@pytest.mark.parametrize("normalization", ["soft_frobenius", "spectral"])
def test_untrained_updates_are_named_as_such_without_a_warning(normalization: str) -> None:
    figures = draw(adapted_model("llama", active=False, normalization=normalization))
    assert list(figures) == NAMES[:4]
    for name in NAMES[1:4]:
        assert title(figures[name]).endswith("\nAll updates are zero: the adapter is untrained.")
    assert matrix(figures["update_norms"]).isnan().all()
    assert matrix(figures["cosines"]).isnan().all()
    assert figures["update_norms"].axes[1].get_ylabel() == "‖ΔW‖ / ‖W₀‖; grey: update of zero"
    drawn = lines(main_axes(figures["singular_values"]))
    assert not drawn["after normalisation: ΔW"][1].any()
    # With a gain of zero the factors themselves are none.
    assert drawn["before normalisation: B·A"][1].any() == (normalization == "spectral")
    assert drawn["zero"][0].tolist() == [1, 2, 3, 4]


def test_singular_values_of_zero_are_marked() -> None:
    model = adapted_model("llama", target_modules=["q_proj"], normalization="none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".heads.B_" in name:
                # Each head emits all columns of B; only the first remains.
                parameter.unflatten(0, (4, -1))[1:] = 0
            if ".shared.B_" in name:
                parameter[:, 1:] = 0
    axes = main_axes(draw(model)["singular_values"])
    assert lines(axes)["after normalisation: ΔW"][1, 0] > 0
    assert not lines(axes)["after normalisation: ΔW"][1, 1:].any()
    assert lines(axes)["zero"].tolist() == [[2, 3, 4], [0, 0, 0]]


def test_a_single_position_and_few_tasks() -> None:
    model = adapted_model("llama", target_modules=[Q_PROJ], r=1)
    assert list(draw(model, tasks=["alpha", "beta"])) == ["singular_values", "update_norms", "cosines"]
    figures = draw(model, tasks=["beta"])
    assert list(figures) == ["singular_values", "update_norms"]
    assert title(figures["singular_values"]).endswith("mean of 1 task: median and range over 1 position")
    assert main_axes(figures["update_norms"]).get_xlabel() == "module"
    axes = main_axes(figures["singular_values"])
    assert [tick for tick in axes.get_xticks() if axes.get_xlim()[0] < tick < axes.get_xlim()[1]] == [1]


def test_many_tasks_are_named_in_part() -> None:
    names = [f"task{index}" for index in range(200)]
    figures = draw(adapted_model("llama", tasks=names, target_modules=["q_proj", "v_proj"]))
    assert len(main_axes(figures["task_map"]).collections[0].get_offsets()) == 200
    assert 5 < len(main_axes(figures["task_map"]).texts) < 60
    assert matrix(figures["cosines"]).shape == (200, 200)
    assert not main_axes(figures["cosines"]).texts
    assert tick_names(main_axes(figures["update_norms"]).yaxis) == names[::7]


def test_the_active_adapter_is_drawn() -> None:
    model = two_adapters()
    model.set_adapter("second")
    figures = draw(model)
    assert tick_names(main_axes(figures["cosines"]).yaxis) == ["one", "two"]
    assert tick_names(main_axes(figures["update_norms"]).xaxis) == ["q_proj", "up_proj"]
