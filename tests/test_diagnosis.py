"""What tells the tasks' updates apart, against dense updates, and the warning when nothing does."""

import re
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.diagnosis import COLLAPSED_SHARE, diagnose
from tests.support.helpers import TASKS, adapted_model, base_weights, snapshot, two_adapters
from tests.support.tolerances import FLOAT64_CONDITIONED, FLOAT64_EXACT

EXACT = {"rtol": FLOAT64_EXACT, "atol": FLOAT64_EXACT}


def dense_updates(model: PeftModel, tasks: list[str] = TASKS) -> list[Tensor]:
    """The updates of every position, each of shape (tasks, out_features, in_features)."""
    network = model.base_model.router.network("default")
    ids = torch.tensor([TASKS.index(task) for task in tasks])
    with torch.no_grad():
        return [factors.delta_weight() for factors in network(ids).values()]


def with_task_embeddings(weight: Tensor, **changes: Any) -> PeftModel:
    model = adapted_model("llama", **changes).double()
    with torch.no_grad():
        model.base_model.router.network("default").task_embedding.weight.copy_(weight)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "row", "rank_pattern": {"q_proj": 2}},
        {"normalization": "whitening"},
        {"normalization": "soft_polar", "normalization_bound": 0.7},
    ],
)
def test_figures_are_those_of_dense_updates(options: dict[str, Any]) -> None:
    model = adapted_model("llama", **options).double()
    result = diagnose(model)
    updates = dense_updates(model)
    norms = torch.stack([update.flatten(1).norm(dim=1) for update in updates])
    weights = base_weights(model)
    base = torch.stack([weights[f"{name}.weight"].norm() for name in result.positions])
    flat = torch.cat([update.flatten(1) for update in updates], dim=1)

    # Norms of base weights are kept in float32.
    single = {"rtol": 1e-6, "atol": 0.0}
    assert result.tasks == tuple(TASKS)
    assert len(result.positions) == len(updates) == 14
    assert_close(result.norms, norms / base[:, None], **single)
    assert_close(result.task_norms, flat.norm(dim=1) / base.norm(), **single)
    assert_close(result.cosines, flat @ flat.T / flat.norm(dim=1).outer(flat.norm(dim=1)), **EXACT)
    share = (flat - flat.mean(0)).square().sum() / flat.square().sum()
    assert_close(torch.tensor(result.share, dtype=torch.float64), share, **EXACT)
    for index, (name, update) in enumerate(zip(result.positions, updates, strict=True)):
        share = (update - update.mean(0)).square().sum() / update.square().sum()
        assert_close(result.position_shares[index], share, **EXACT)
        values = result.singular_values[name]
        assert_close(values, torch.linalg.svdvals(update)[:, : values.shape[1]], **EXACT)
    assert result.singular_values["model.layers.0.self_attn.q_proj"].shape == (3, 2 if "rank_pattern" in options else 4)


@pytest.mark.parametrize(("method", "bound"), [("soft_frobenius", 0.6), ("soft_polar", 0.8)])
def test_updates_at_their_bound_are_told_by_layer(method: str, bound: float) -> None:
    model = adapted_model("llama", normalization=method, normalization_bound=bound).double()
    result = diagnose(model)
    weights, shares = base_weights(model), []
    for name, update in zip(result.positions, dense_updates(model), strict=True):
        spectra = torch.linalg.svdvals(update)
        sizes = spectra.norm(dim=1) if method == "soft_frobenius" else 2 * spectra[:, 0]
        shares.append(sizes / (bound * weights[f"{name}.weight"].norm()))
    assert_close(result.bound_shares, torch.stack(shares), rtol=1e-6, atol=0)
    at_bound = (torch.stack(shares) >= 0.9).double()
    assert 0 < float(at_bound.mean()) < 1
    layers = {
        f"layer_{index}": float(at_bound[[f".{index}." in name for name in result.positions]].mean())
        for index in range(2)
    }
    assert result.saturation.share == pytest.approx(float(at_bound.mean()))
    assert result.saturation.layers == pytest.approx(layers)


@pytest.mark.parametrize(("bound", "share"), [(0.2, "100%"), (100.0, "0%")])
def test_text_says_what_to_do_where_most_updates_are_at_their_bound(bound: float, share: str) -> None:
    line = str(
        diagnose(adapted_model("llama", normalization_bound=bound, normalization="soft_frobenius"))
    ).splitlines()[-1]
    assert line.startswith(f"{share} of the updates are at their bound (90% of it or more)")
    assert ("raise normalization_bound" in line) == (share == "100%")


@pytest.mark.parametrize(
    "options", [{"normalization": "none"}, {"normalization": "whitening", "normalization_factors": "A"}]
)
def test_without_a_bound_nothing_is_said_of_it(options: dict[str, Any]) -> None:
    result = diagnose(adapted_model("llama", **options))
    assert result.bound_shares is None
    assert result.saturation is None
    assert "bound" not in str(result)


@pytest.mark.parametrize("method", ["soft_frobenius", "soft_polar"])
def test_autocast_does_not_matter(method: str) -> None:
    model = adapted_model("llama", normalization=method, normalization_bound=0.5)
    expected = diagnose(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = diagnose(model)
    assert torch.equal(result.bound_shares, expected.bound_shares)
    assert torch.equal(result.cosines, expected.cosines)


def test_tasks_are_chosen_by_name() -> None:
    model = adapted_model("llama")
    whole, part = diagnose(model), diagnose(model, ["gamma", "alpha"])
    assert part.tasks == ("gamma", "alpha")
    assert_close(part.cosines, whole.cosines[[2, 0]][:, [2, 0]])
    assert_close(part.norms, whole.norms[:, [2, 0]])
    assert_close(part.bound_shares, whole.bound_shares[:, [2, 0]])


def test_one_task_has_nothing_to_be_compared_with() -> None:
    result = diagnose(adapted_model("llama"), ["beta"])
    assert_close(result.cosines, torch.ones(1, 1, dtype=torch.float64), **EXACT)
    assert result.share < FLOAT64_CONDITIONED
    assert not result.is_collapsed
    assert "1 tasks at 14 positions" in str(result)


def test_tasks_that_are_told_apart_raise_no_warning() -> None:
    result = diagnose(adapted_model("llama"))
    assert result.share > COLLAPSED_SHARE
    assert not result.is_collapsed
    assert not result.is_zero


@pytest.mark.parametrize("normalization", ["soft_frobenius", "soft_polar", "spectral"])
def test_a_hypernetwork_that_ignores_its_condition_is_reported(normalization: str) -> None:
    message = (
        "The hypernetwork of adapter 'default' ignores its condition: only 0.00% of the updates depend on the task"
    )
    model = with_task_embeddings(torch.ones(3, 8), normalization=normalization)
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        result = diagnose(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert result.is_collapsed
    assert_close(result.cosines, torch.ones(3, 3, dtype=torch.float64), **EXACT)


def test_the_warning_begins_at_its_threshold() -> None:
    noise = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for scale in (0.01, 0.03, 0.1, 0.3, 1.0):
        model = with_task_embeddings(1 + scale * noise)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            share = diagnose(model).share
        outcomes.append((share < COLLAPSED_SHARE, any("ignores its condition" in str(one.message) for one in caught)))
    assert [collapsed for collapsed, _ in outcomes] == sorted((collapsed for collapsed, _ in outcomes), reverse=True)
    assert all(collapsed == warned for collapsed, warned in outcomes)
    assert {collapsed for collapsed, _ in outcomes} == {True, False}


@pytest.mark.parametrize("normalization", ["soft_frobenius", "spectral"])
def test_updates_of_zero_are_reported_as_untrained(normalization: str) -> None:
    model = adapted_model("llama", active=False, normalization=normalization)
    with pytest.warns(UserWarning, match="All updates of adapter 'default' are zero: .* It is untrained"):
        result = diagnose(model)
    assert result.is_zero
    assert not result.is_collapsed
    assert result.cosines.isnan().all()
    assert "none, all are zero" in str(result)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(training: bool) -> None:
    model = adapted_model("llama", lora_dropout=0.5).train(training)
    model.set_task("beta")
    before = snapshot(model)
    state = torch.get_rng_state()
    result = diagnose(model)
    assert model.training == training
    assert model.base_model.router.pinned == {"default": "beta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(tensor.requires_grad for tensor in (result.cosines, result.norms, *result.singular_values.values()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_text_shows_each_task_and_the_positions_that_differ_least() -> None:
    result = diagnose(adapted_model("llama"))
    lines = str(result).splitlines()
    assert lines[0].startswith("3 tasks at 14 positions; share of the updates that the task explains: ")
    assert [line.split()[0] for line in lines[2:5]] == TASKS
    assert f"{float(result.task_norms[0]):.2e}" in lines[2]
    assert lines[2].split()[3] == ("beta" if result.cosines[0, 1] > result.cosines[0, 2] else "gamma")
    assert lines[6].strip().startswith(result.positions[int(result.position_shares.argmin())])
    assert repr(result) == str(result)
    html = result._repr_html_()
    assert re.findall(r"<th>(.*?)</th>", html) == ["task", "norm / base", "stable rank", "nearest task (cosine)"]
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert cells[::4] == TASKS
    assert cells[3] == result.nearest(0)
    assert html.startswith(f"<div>{lines[0]}<table>")
    assert f"</table>{lines[5]}<br>" in html
    names = [f"task{index}" for index in range(25)]
    assert "and 5 more tasks" in str(diagnose(adapted_model("llama", tasks=names)))


def test_bad_calls() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match=re.escape(f"Unknown task 'delta'. Known tasks: {TASKS}.")):
        diagnose(model, ["alpha", "delta"])
    with pytest.raises(ValueError, match=re.escape("tasks names ['alpha'] more than once")):
        diagnose(model, ["alpha", "beta", "alpha"])
    with pytest.raises(ValueError, match="tasks is empty"):
        diagnose(model, [])
    with pytest.raises(TypeError, match="tasks='alpha' must be a list of task names, or None"):
        diagnose(model, "alpha")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=re.escape("One adapter must be active, but ['default', 'second'] are.")):
        diagnose(model)
    with pytest.raises(TypeError, match="has no hyperadapter"):
        diagnose(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["soft_polar", "frobenius", "spectral", "whitening", "weight_norm"])
def test_weights_that_are_not_finite_are_an_error(method: str) -> None:
    model = adapted_model("llama", normalization=method)
    with torch.no_grad():
        model.base_model.router.network("default").task_embedding.weight[1] = torch.nan
    message = "The update of task 'beta' at 'model.layers.0.self_attn.q_proj' is not finite: training has diverged."
    with pytest.raises(ValueError, match=re.escape(message)):
        diagnose(model)


def test_names_of_tasks_are_no_html() -> None:
    html = diagnose(adapted_model("llama", tasks=["<b>", "a & b"]))._repr_html_()
    assert "<td>&lt;b&gt;</td>" in html
    assert "<td>a &amp; b</td>" in html
