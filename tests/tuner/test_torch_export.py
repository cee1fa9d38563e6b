"""torch.export: one program for batches of any size, of one task, a pinned or merged one, and ids as an input."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.testing import assert_close

from tests.support.helpers import ARCHITECTURES, adapted_model, double, example_batch
from tests.support.tolerances import FLOAT64_MODEL

CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}
TARGETS = {"vit": ["projection", "dense", "query"], "gpt2": ["c_attn", "c_fc", "wte"]}


class Logits(nn.Module):
    """A model whose inputs are tensors and whose output is one."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.fixed = fixed

    def forward(self, batch: dict[str, Tensor], routing: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**batch, **routing, **self.fixed).logits
        return logits


def inputs(name: str, rows: int) -> dict[str, Tensor]:
    return double(example_batch(name, rows, seed=rows, labels=False))


def exported(module: nn.Module, *args: dict[str, Tensor], strict: bool = False) -> ExportedProgram:
    """With a batch of any size from 2."""
    rows = Dim("rows", min=2, max=64)
    shapes = tuple({key: {0: rows} for key in arg} for arg in args)
    with torch.no_grad():
        return torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=strict)


def check(module: nn.Module, name: str, routing: Any = lambda rows: {}, strict: bool = False) -> None:
    """The program gives what the module gives, for more rows than in its example and for fewer."""
    if strict:
        # A graph cannot learn where rows lie.
        module(inputs(name, 4), routing(4))
    program = exported(module, inputs(name, 4), routing(4), strict=strict).module()
    for rows in (2, 3, 4, 7):
        with torch.no_grad():
            args = inputs(name, rows), routing(rows)
            assert_close(program(*args), module(*args), **CLOSE)


def model_of(name: str, **changes: Any) -> PeftModel:
    return adapted_model(name, target_modules=TARGETS.get(name, "all-linear"), **changes).double()


@pytest.mark.parametrize("naming", ["name", "pinned", "merged"])
def test_one_task(naming: str) -> None:
    model = model_of("bert")
    expected = Logits(model, tasks="beta")(inputs("bert", 5), {})
    model.set_task("beta")
    if naming == "merged":
        model = model.merge_and_unload()
    module = Logits(model, **({"tasks": "beta"} if naming == "name" else {}))
    assert_close(module(inputs("bert", 5), {}), expected, **CLOSE)
    check(module, "bert")


def ids(rows: int) -> dict[str, Tensor]:
    return {"tasks": (torch.arange(rows) * 2 + 1) % 3}


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != "llama")]
)
def test_ids_are_an_input(name: str) -> None:
    check(Logits(model_of(name)), name, ids)


# Of what transformers keeps for the time of a call.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.slow
def test_strict_mode() -> None:
    check(Logits(model_of("bert")), "bert", ids, strict=True)


@pytest.mark.slow
def test_task_embeddings_are_an_input() -> None:
    def embeddings(rows: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        return {"task_embeddings": torch.randn(rows, 8, generator=generator, dtype=torch.float64)}

    check(Logits(model_of("bert")), "bert", embeddings)
