"""Picture of a training run: the numbers in it are those that were logged."""

import math
import re
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperadapt.plots.training import training_figure


def entry(step: int, loss: float, grad_norm: float | None = None, **values: float) -> dict[str, Any]:
    norms = {} if grad_norm is None else {"grad_norm": grad_norm}
    names = {name.replace("__", "/"): value for name, value in values.items()}
    return {"loss": loss, **norms, "learning_rate": 1e-3, "epoch": 0.5, "step": step, **names}


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points by name in the legend; those that are not drawn left out."""
    return {
        line.get_label(): [(x, y) for x, y in line.get_xydata().tolist() if math.isfinite(y)]
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def drawn(history: list[dict[str, Any]], tasks: list[str]) -> Figure:
    figure = training_figure(history, tasks)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def test_losses_are_drawn_by_task() -> None:
    history = [
        entry(10, 3.0, loss_a=4.0, loss_b=2.0),
        # No row of b since the last entry.
        entry(20, 2.0, loss_a=2.0),
        {"eval_a_loss": 9.0, "step": 20},
        entry(30, 1.0, loss_a=1.5, loss_b=0.5, loss_other=7.0),
        {"train_loss": 9.0, "train_runtime": 9.0, "step": 30},
    ]
    (axes,) = drawn(history, ["a", "b", "never"]).axes
    assert curves(axes) == {
        "a": [(10, 4), (20, 2), (30, 1.5)],
        "b": [(10, 2), (30, 0.5)],
        "all rows": [(10, 3), (20, 2), (30, 1)],
    }
    assert axes.get_title(loc="left") == "Training loss by task"
    assert axes.get_ylabel() == "training loss"
    assert axes.get_xlabel() == "step of the optimiser"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "all rows"]


def test_tasks_are_told_apart_by_colour_and_line() -> None:
    names = [f"task{index}" for index in range(14)]
    (axes,) = drawn(
        [entry(step, 1.0, **dict.fromkeys((f"loss_{name}" for name in names), 1.0)) for step in (1, 2)], names
    ).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines if line.get_label() in names}
    assert len(looks) == 14


def test_of_many_tasks_the_worst_are_named() -> None:
    names = [f"task{index}" for index in range(20)]
    history = [entry(1, 1.0, **{f"loss_{name}": float(index) for index, name in enumerate(names)})]
    history.append(entry(2, 1.0, loss_task0=50.0, loss_task1=math.nan))
    (axes,) = drawn(history, names).axes
    named = curves(axes)
    assert named.keys() == {"task1", "task0", "task19", "task18", "task17", "all rows", "not finite"}
    assert named["task0"] == [(1, 0), (2, 50)]
    # In an order that is the same in every process, as the files' bytes have to be.
    assert [line.get_ydata().tolist() for line in axes.lines[:15]] == [[float(index)] for index in range(2, 17)]
    assert axes.get_title(loc="left") == "Training loss by task; the 5 highest at the end of 20 have names"


def test_gradient_norms_are_drawn_overall_and_by_position() -> None:
    history = [
        entry(1, 1.0, 8.0, grad_norm__p=1.0, grad_norm__q=2.0, grad_norm__r=9.0, update_norm__p=5.0),
        entry(2, 1.0, 4.0, grad_norm__p=3.0, grad_norm__q=1.0, grad_norm__r=4.0, update_norm__p=5.0),
    ]
    axes = drawn(history, []).axes[1]
    spread = "factors A, B at each of\n3 positions: median, range"
    assert curves(axes) == {spread: [(1, 2), (2, 3)], "all parameters": [(1, 8), (2, 4)]}
    bounds = [line.get_ydata().tolist() for line in axes.lines if line.get_label().startswith("_")]
    assert bounds == [[1, 1], [9, 4]]
    assert axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "Norm of the gradient, overall and by position"


def test_norms_by_position_need_none_overall() -> None:
    axes = drawn([entry(1, 1.0, grad_norm__p=3.0)], []).axes[1]
    assert curves(axes) == {"factors A, B at each of\n1 position: median, range": [(1, 3)]}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_marked(broken: float) -> None:
    history = [
        entry(1, 3.0, 1.0, loss_a=3.0, grad_norm__p=1.0, grad_norm__q=2.0),
        entry(2, broken, 2.0, loss_a=2.0, grad_norm__p=broken, grad_norm__q=4.0),
        entry(3, 1.0, broken, loss_a=broken, grad_norm__p=broken, grad_norm__q=broken),
        entry(4, 1.0, 3.0, loss_a=1.0, grad_norm__p=1.0, grad_norm__q=3.0),
    ]
    losses, norms = (curves(axes) for axes in drawn(history, ["a"]).axes)
    assert losses == {
        "a": [(1, 3), (2, 2), (4, 1)],
        "all rows": [(1, 3), (3, 1), (4, 1)],
        "not finite": [(2, 1), (3, 1)],
    }
    spread = "factors A, B at each of\n2 positions: median, range"
    assert norms == {
        spread: [(1, 1.5), (2, 4), (4, 2)],
        "all parameters": [(1, 1), (2, 2), (4, 3)],
        "not finite": [(2, 1), (3, 1)],
    }


def test_a_run_that_is_broken_throughout_is_drawn() -> None:
    losses, norms = (curves(axes) for axes in drawn([entry(step, math.nan, math.nan) for step in (1, 2)], ["a"]).axes)
    assert losses == {"all rows": [], "not finite": [(1, 1), (2, 1)]}
    assert norms == {"all parameters": [], "not finite": [(1, 1), (2, 1)]}


def test_norms_of_zero_are_marked_below_the_axis() -> None:
    axes = drawn([entry(1, 1.0, 0.0), entry(2, 1.0, 0.5), entry(3, 1.0, 2.0)], []).axes[1]
    assert curves(axes)["zero"] == [(1, 0)]
    low, high = axes.get_ylim()
    assert 0 < low < 0.5
    assert 2 < high < 10


def test_a_single_entry_is_visible_and_has_its_step_as_a_tick() -> None:
    figure = drawn([entry(10, 1.0, 2.0)], [])
    assert all(line.get_marker() == "." for axes in figure.axes for line in axes.lines)
    low, high = figure.axes[1].get_xlim()
    assert [tick for tick in figure.axes[1].get_xticks() if low < tick < high] == [10]


@pytest.mark.parametrize("history", [[], [{"eval_loss": 1.0, "step": 3}, {"train_loss": 2.0, "step": 3}]])
def test_without_a_training_loss_there_is_no_picture(history: list[dict[str, Any]]) -> None:
    assert training_figure(history, ["a"]) is None


def test_anything_but_a_log_is_refused() -> None:
    message = "must be a list of dicts; pass trainer.state.log_history."
    for wrong in ({"loss": 1.0}, [entry(1, 1.0), 7], "a log"):
        with pytest.raises(TypeError, match=re.escape(message)):
            training_figure(wrong, ["a"])
    for key, value in (("loss_a", "1.0"), ("loss", None), ("grad_norm", torch.ones(1)), ("grad_norm/p", [1.0])):
        with pytest.raises(
            TypeError, match=re.escape(f"log_history has {key}=") + r".* at step=3; both must be numbers\."
        ):
            training_figure([entry(3, 1.0) | {key: value}], ["a"])
    with pytest.raises(TypeError, match="at step='3'; both must be numbers"):
        training_figure([{"loss": 1.0, "step": "3"}], ["a"])


VALIDATED = [
    entry(10, 3.0),
    {"eval_a_accuracy": 0.4, "eval_a_loss": 1.0, "step": 10},
    {"eval_mean_accuracy": 0.5, "eval_mean_loss": 1.0, "step": 10},
    entry(20, 2.0, 0.5),
    {"eval_mean_accuracy": 0.75, "eval_mean_loss": 0.8, "step": 20},
    {"eval_mean_accuracy": 0.75, "eval_mean_loss": 0.5, "step": 30},
    {"eval_mean_accuracy": math.nan, "eval_mean_loss": 0.9, "step": 40},
]


@pytest.mark.parametrize(
    ("chosen_by", "name", "points", "best"),
    [
        # Of equal ones the first.
        (None, "mean accuracy", [(10, 0.5), (20, 0.75), (30, 0.75)], 20),
        ("mean_loss", "mean loss", [(10, 1.0), (20, 0.8), (30, 0.5), (40, 0.9)], 30),
        ("eval_a_loss", "a loss", [(10, 1.0)], 10),
    ],
)
def test_what_chose_the_checkpoint_is_drawn(
    chosen_by: str | None, name: str, points: list[tuple[float, float]], best: int
) -> None:
    figure = training_figure(VALIDATED, ["a"], chosen_by)
    assert figure is not None
    losses, choice, norms = figure.axes
    found = curves(choice)
    assert found[name] == points
    assert found[f"best, step {best}"] == [(best, dict(points)[best])]
    assert choice.get_ylabel() == name
    assert (losses.get_ylabel(), norms.get_ylabel()) == ("training loss", "norm of the gradient")


def test_without_such_a_metric_nothing_is_drawn_of_it() -> None:
    figure = training_figure(VALIDATED, ["a"], "f1")
    assert figure is not None
    assert len(figure.axes) == 2
    assert len(drawn([entry(1, 2.0), {"eval_loss": 3.0, "step": 1}], []).axes) == 2
