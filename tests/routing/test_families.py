"""In every family of models, a batch of several tasks equals its rows alone, or is refused: for all sizes alike."""

import itertools
import re
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from hyperadapt import use_tasks
from tests.support.families import FAMILIES
from tests.support.family import Family
from tests.support.family_inputs import Batch
from tests.support.helpers import ROOT, TASKS, adapter_config, adapter_parameters, make_active
from tests.support.tolerances import FLOAT64_MODEL

SIZES = (1, 2, 3, 4, 8, 16)
# Rows and lengths that are equal, and that divide each other both ways.
FEW = [(3, 3), (4, 2), (2, 4)]
ALL = list(itertools.product(SIZES, SIZES))


def adapted(family: Family) -> PeftModel:
    """Tasks differ by a lot, so that generated tokens do, too."""
    config = adapter_config(target_modules=family.targets, exclude_modules=family.exclude, normalization_bound=4.0)
    torch.manual_seed(0)
    return make_active(get_peft_model(family.build(), config)).double()


def output(family: Family, model: PeftModel, batch: Batch, tasks: Any) -> Tensor:
    # Some models draw positions in random order.
    torch.manual_seed(1)
    if family.run is not None:
        return family.run(model, {**batch, "tasks": tasks})
    found = model(**batch, tasks=tasks)
    if isinstance(found, Tensor):
        return found
    names = ("logits", "last_hidden_state", "logits_per_text")
    return next(value for value in (getattr(found, name, None) for name in names) if value is not None)


def tasks_of(rows: int) -> list[str]:
    return [TASKS[index % 3] for index in range(rows)]


@torch.no_grad()
def check(name: str, rows: int, length: int) -> None:
    family = FAMILIES[name]
    model, batch = adapted(family), family.batch(rows, length)
    if rows > 1 and not family.is_mixed:
        with pytest.raises(ValueError, match=r"cannot be told apart: .*exclude_modules.*one task per batch.*task_rows"):
            output(family, model, batch, tasks_of(rows))
        # One task per batch, however named, is always possible.
        assert torch.equal(output(family, model, batch, ["gamma"] * rows), output(family, model, batch, "gamma"))
        return
    together = output(family, model, batch, tasks_of(rows))
    for row, task in enumerate(tasks_of(rows)):
        alone = output(family, model, family.one(batch, row), task)
        assert_close(together[row : row + 1], alone, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
    if rows > 1:
        assert (together - output(family, model, batch, "gamma")).abs().max() > 1e-3, "tasks make no difference"


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_batch_equals_its_rows_or_is_refused(name: str) -> None:
    for rows, length in FEW:
        check(name, rows, length)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_sizes_alike(name: str) -> None:
    for rows, length in ALL:
        check(name, rows, length)


@pytest.mark.parametrize("name", ["llava", "idefics3", "windows", "guidance inside"])
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(name: str) -> None:
    family = FAMILIES[name]
    model, batch = adapted(family), family.batch(3, 2)

    def gradients(batch: Batch, tasks: Any, row: int | None = None) -> dict[str, Tensor]:
        model.zero_grad()
        found = output(family, model, batch, tasks)
        found.square().sum().backward()
        return {key: value.grad.clone() for key, value in adapter_parameters(model).items()}

    together = gradients(batch, tasks_of(3))
    alone = [gradients(family.one(batch, row), task) for row, task in enumerate(tasks_of(3))]
    scale = max(float(value.abs().max()) for value in together.values())
    for key, value in together.items():
        total = sum(one[key] for one in alone)
        assert_close(value, total, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL * scale, msg=key)
    assert scale > 0


def test_told_rows() -> None:
    family = FAMILIES["clip, other numbers"]
    model, batch = adapted(family), family.batch(4, 3)
    tasks = ["alpha", "beta", "gamma", "beta"]
    # Two images: the first belongs to the text of row 3, the second to that of row 0.
    told = {"vision_model": [3, 0], "visual_projection": torch.tensor([3, 0])}
    with torch.no_grad():
        images = model(**batch, tasks=tasks, task_rows=told).image_embeds
        with use_tasks(model, tasks):
            assert torch.equal(model(**batch, task_rows=told).image_embeds, images)
        for index, task in enumerate(("beta", "alpha")):
            alone = model(**batch, tasks=task).image_embeds[index]
            assert_close(images[index], alone, rtol=FLOAT64_MODEL, atol=FLOAT64_MODEL)
    for rows, message in (
        ([3, 4], r"task_rows has \[3, 4\] for it, but rows are from 0 to 3"),
        ([0, 1, 2], "does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, tasks=tasks, task_rows={"vision_model": rows, "visual_projection": rows})


def test_the_docs_tell_which_families_take_mixed_batches() -> None:
    page = (ROOT / "docs" / "mixed-batches.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| (.+?) \| (yes|refused)", page, flags=re.MULTILINE))
    assert told == {name: "yes" if family.is_mixed else "refused" for name, family in FAMILIES.items()}
