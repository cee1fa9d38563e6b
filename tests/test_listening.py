"""Controls: the same rows under a task's own condition and under others, against calls made one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import hyperadapt
from hyperadapt import listening
from hyperadapt.listening import BLANK, UNRELATED
from tests.support.helpers import ROWS, TASKS, adapted_model, example_batch, letters, logits, snapshot
from tests.support.tolerances import FLOAT32_FORWARD

BATCH = example_batch("llama", labels=False)
DESCRIPTIONS = {
    "alpha": "Find the topic.",
    "beta": ["Is it spam?", "Tell spam from the rest."],
    "gamma": "Who wrote it?",
}


def text_model(sources: str | dict[str, str], **changes: Any) -> PeftModel:
    return adapted_model("llama", tasks=DESCRIPTIONS, task_embedding=sources, text_encoder=letters, **changes)


def last_logit(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    assert not torch.is_grad_enabled()
    assert not model.training
    return model(**rows).logits[:, -1, 7]


def expected(model: PeftModel, **routing: Any) -> Tensor:
    return logits(model, BATCH, **routing)[:, -1, 7].double()


def described(model: PeftModel, *texts: str | list[str]) -> Tensor:
    """Mean over descriptions of what each row gets under each."""
    return torch.stack(
        [
            expected(model, task_embeddings=model.base_model.embed_description(text, text_encoder=letters))
            for text in texts
        ]
    ).mean(0)


def check(found: hyperadapt.Controls, values: dict[str, Tensor]) -> None:
    assert [arm.name for arm in found.arms] == list(values)
    assert found.rows == ROWS
    for arm in found.arms:
        gains = values["true"] - values[arm.name]
        tolerance = {"rel": FLOAT32_FORWARD, "abs": FLOAT32_FORWARD}
        assert arm.mean == pytest.approx(float(values[arm.name].mean()), **tolerance)
        assert arm.gain == pytest.approx(float(gains.mean()), **tolerance)
        # No mean of drawn rows is outside of what the rows got.
        low, high = arm.interval
        assert float(gains.min()) - 1e-5 <= low <= high <= float(gains.max()) + 1e-5


@pytest.mark.parametrize("is_training", [False, True])
def test_a_described_task_and_its_controls(is_training: bool) -> None:
    model = text_model("text").train(is_training)
    before = snapshot(model)
    found = hyperadapt.controls(model, "alpha", BATCH, last_logit, text_encoder=letters)
    assert model.training == is_training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    check(
        found,
        {
            "true": expected(model, tasks="alpha"),
            "shuffled": (expected(model, tasks="beta") + expected(model, tasks="gamma")) / 2,
            "blank": described(model, BLANK),
            "unrelated": described(model, *UNRELATED),
        },
    )
    conditions = {arm.name: arm.conditions for arm in found.arms}
    assert conditions == {
        "true": ("alpha",),
        "shuffled": ("beta", "gamma"),
        "blank": (BLANK,),
        "unrelated": UNRELATED,
    }
    assert found.without == {}


def test_what_was_learned_beside_a_description_is_told_apart() -> None:
    model = text_model({"alpha": "both", "beta": "both", "gamma": "learned"})
    weight = model.base_model.router.network("default").task_embedding.weight
    torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    found = hyperadapt.controls(model, "alpha", BATCH, last_logit, text_encoder=letters)
    texts = {name: described(model, DESCRIPTIONS[name]) for name in ("alpha", "beta")}
    check(
        found,
        {
            "true": texts["alpha"],
            "shuffled": texts["beta"],
            "blank": described(model, BLANK),
            "unrelated": described(model, *UNRELATED),
            "task": expected(model, tasks="alpha"),
        },
    )
    # A learned embedding reads no text, so any task is its control.
    found = hyperadapt.controls(model, "gamma", BATCH, last_logit)
    others = (expected(model, tasks="alpha") + expected(model, tasks="beta")) / 2
    check(found, {"true": expected(model, tasks="gamma"), "shuffled": others})
    assert found.without == dict.fromkeys(("blank", "unrelated"), "the task's embedding reads no description")


def with_own_factors(model: PeftModel, *tasks: str) -> PeftModel:
    generator = torch.Generator().manual_seed(2)
    for task in tasks:
        model.add_own_factors(task)
    for parameter in model.base_model.router.network("default").own_factors.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


def test_a_task_is_answered_with_its_own_factors() -> None:
    model = with_own_factors(adapted_model("llama", tasks=["one", "two"]), "one", "two")
    found = hyperadapt.controls(model, "one", BATCH, last_logit)
    values = [expected(model, tasks=task) for task in ("one", "two")]
    check(found, dict(zip(("true", "shuffled"), values, strict=True)))

    # Beside a description they are told apart from it.
    model = with_own_factors(text_model("text"), "alpha")
    found = hyperadapt.controls(model, "alpha", BATCH, last_logit, text_encoder=letters)
    values = [described(model, DESCRIPTIONS["alpha"]), expected(model, tasks="alpha")]
    means = {arm.name: arm.mean for arm in found.arms}
    assert (means["true"], means["task"]) == pytest.approx([float(one.mean()) for one in values], rel=FLOAT32_FORWARD)
    assert means["true"] != means["task"]
    assert "task" not in {
        arm.name for arm in hyperadapt.controls(model, "beta", BATCH, last_logit, text_encoder=letters).arms
    }


def test_of_many_tasks_three_are_drawn_by_the_seed() -> None:
    model = adapted_model("llama", tasks=[f"task {index}" for index in range(9)])

    def others(seed: int) -> tuple[str, ...]:
        return hyperadapt.controls(model, "task 4", BATCH, last_logit, seed=seed).arms[1].conditions

    assert len(set(others(0))) == 3
    assert others(0) == others(0)
    drawn = {name for seed in range(8) for name in others(seed)}
    assert drawn == {f"task {index}" for index in range(9)} - {"task 4"}


def test_an_only_described_task_has_two_controls() -> None:
    model = text_model({"alpha": "text", "beta": "learned", "gamma": "learned"})
    found = hyperadapt.controls(model, "alpha", BATCH, last_logit, text_encoder=letters)
    assert [arm.name for arm in found.arms] == ["true", "blank", "unrelated"]
    assert found.without == {"shuffled": "the adapter has no other task with a description"}
    assert "shuffled    none: the adapter has no other task with a description" in str(found)


def given(*values: Any) -> Callable[[nn.Module, Any], Any]:
    """A metric that gives prepared values, call by call."""
    prepared = iter(values)
    return lambda model, rows: next(prepared)


def test_intervals_are_paired_and_seeded() -> None:
    model = adapted_model("llama", tasks=["one", "two"])
    chooser = np.random.default_rng(3)
    own, noise = chooser.normal(size=200), chooser.normal(scale=0.1, size=200)

    # What all rows lose alike has no interval, however much the rows differ.
    arm = hyperadapt.controls(model, "one", None, given(own, own - 0.25)).arms[1]
    assert (arm.gain, *arm.interval) == pytest.approx((0.25, 0.25, 0.25))

    found = [hyperadapt.controls(model, "one", None, given(own, own + noise), seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    low, high = found[0].arms[1].interval
    error = noise.std() / 200**0.5
    assert (low, high) == pytest.approx((-noise.mean() - 1.96 * error, -noise.mean() + 1.96 * error), abs=error / 4)


def test_the_verdict() -> None:
    model = adapted_model("llama", tasks=["one", "two"])
    above = hyperadapt.controls(model, "one", None, given([True, True, True], [False, False, False]))
    assert above.is_above
    lines = str(above).splitlines()
    assert lines[0] == "one, 3 rows"
    assert [line.split() for line in lines[2:4]] == [
        ["true", "1.000"],
        ["shuffled", "0.000", "1.000", "1.000", "to", "1.000"],
    ]
    assert lines[-1] == "The true condition is above every control."
    html = above._repr_html_()
    assert re.findall(r"<td>(.*?)</td>", html) == [
        *("true", "1.000", "", ""),
        *("shuffled", "0.000", "1.000", "1.000 to 1.000"),
    ]
    assert html.startswith("<div>one, 3 rows<table>")
    assert html.endswith("<br>The true condition is above every control.</div>")
    even = hyperadapt.controls(model, "one", None, given([True, False, True], [True, True, False]))
    assert not even.is_above
    assert str(even).endswith("The true condition is not above every control.")


def test_one_encoder_call_serves_all_texts() -> None:
    model, calls = text_model("text"), []

    def counted(texts: list[str]) -> Tensor:
        calls.append(len(texts))
        return letters(texts)

    neutral = listening.neutral_conditions(model, counted)
    # The known description, by which the encoder is recognised, a dash and three sentences.
    assert calls == [5]
    assert [len(condition.requests) for condition in neutral.values()] == [1, 3]


def named(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return model(**rows, tasks="beta").logits[:, -1, 7]


@pytest.mark.parametrize(
    ("task", "metric", "error", "message"),
    [
        ("delta", last_logit, ValueError, "Unknown task 'delta'. Known tasks: ['alpha', 'beta', 'gamma']."),
        (3, last_logit, TypeError, "task=3 must be the name of a task, not int."),
        ("alpha", named, ValueError, "metric names tasks itself, so that all conditions would get the same answers."),
        ("beta", named, ValueError, "metric names tasks itself, so that all conditions would get the same answers."),
        ("alpha", given("good"), TypeError, "metric gave 'good', but must give a number for each row."),
        ("alpha", given(0.5), ValueError, "metric gave 0.5 of shape (), but must give a finite number for each row"),
        ("alpha", given([0.5]), ValueError, "metric gave [0.5] of shape (1,), but must give a finite number"),
        ("alpha", given([0.5, float("nan")]), ValueError, "metric gave [0.5, nan] of shape (2,), but must give"),
        ("alpha", given([1, 0], [1, 0, 1], [1, 0]), ValueError, "metric gave [2, 3] numbers for the same rows."),
    ],
)
def test_what_is_wrong(task: Any, metric: Any, error: type[Exception], message: str) -> None:
    model = adapted_model("llama").train()
    with pytest.raises(error, match=re.escape(message)):
        hyperadapt.controls(model, task, BATCH, metric)
    assert model.training
    # No hook is left behind.
    assert torch.equal(logits(model.eval(), BATCH, tasks="beta"), logits(model, BATCH, tasks=["beta"] * ROWS))


def test_an_only_task_has_nothing_to_be_compared_with() -> None:
    model = adapted_model("llama", tasks=["alone"])
    message = "Task 'alone' has nothing to be compared with: the adapter has no other task; the task's embedding reads"
    with pytest.raises(ValueError, match=re.escape(message)):
        hyperadapt.controls(model, "alone", BATCH, last_logit)
    with pytest.raises(TypeError, match="has no hyperadapter"):
        hyperadapt.controls(nn.Linear(2, 2), "alone", BATCH, last_logit)


def test_another_encoder_is_refused() -> None:
    model = text_model("text")
    with pytest.raises(ValueError, match=re.escape("were encoded by the function")):
        hyperadapt.controls(model, TASKS[0], BATCH, last_logit)


def test_a_metric_may_generate() -> None:
    model = text_model("text")
    model.generation_config.pad_token_id = 0

    def tokens(**routing: Any) -> Tensor:
        answers: Tensor = model.generate(**BATCH, **routing, max_new_tokens=3, do_sample=False)
        return answers[:, -3:].double().mean(1)

    found = hyperadapt.controls(model, "gamma", BATCH, lambda model, rows: tokens(), text_encoder=letters)
    means = {arm.name: arm.mean for arm in found.arms}
    assert means["true"] == float(tokens(tasks="gamma").mean())
    blank = model.base_model.embed_description(BLANK, text_encoder=letters)
    assert means["blank"] == float(tokens(task_embeddings=blank).mean())
    assert len(set(means.values())) > 1
