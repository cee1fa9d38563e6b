"""Tests of the hypernetwork: shapes, independence of batching, initial scale, step size and cost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hyperadapt.config import HEADS
from hyperadapt.hypernetwork.blocks import Head
from hyperadapt.hypernetwork.hypernetwork import Generated, Hypernetwork
from hyperadapt.hypernetwork.positions import Position
from tests.support.tolerances import (
    ADAM_FIRST_STEP,
    FLOAT32_DIFFERENCE,
    FLOAT32_FORMULA,
    FLOAT32_FORWARD,
    sample_variance_error,
)

DIM = 8
# Two layers of four modules with three shapes, and one module outside of layers; 6 and 10 are sizes of both
# an input and an output.
SHAPES = {"q": (6, 6), "k": (6, 6), "up": (6, 10), "down": (10, 6)}
POSITIONS = [
    *(Position(f"h.{layer}.{module}", *shape, r=4) for layer in range(2) for module, shape in SHAPES.items()),
    Position("classifier", 6, 3, r=4),
]


def make_hypernetwork(positions: Sequence[Position] = POSITIONS, **changes: Any) -> Hypernetwork:
    options: dict[str, Any] = {
        "task_embedding_dim": DIM,
        "hypernetwork_dim": 16,
        "hypernetwork_depth": 2,
        "head": "factor",
    }
    return Hypernetwork(positions, **(options | changes))


def by_name(generated: list[Generated]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each position, with the tasks as first dimension."""
    return {
        position.name: (group.lora_A[:, index], group.lora_B[:, index])
        for group in generated
        for index, position in enumerate(group.positions)
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("r", [1, 4])
def test_every_position_gets_factors_of_its_shape(head: str, r: int) -> None:
    positions = [replace(position, r=r) for position in POSITIONS]
    hypernetwork = make_hypernetwork(positions, head=head)
    generated = hypernetwork(torch.randn(3, DIM), positions)
    assert sorted(len(group.positions) for group in generated) == [1, 2, 2, 4]
    assert all(group.lora_B.mT.is_contiguous() for group in generated)
    assert all(group.logits is None for group in generated)
    factors = by_name(generated)
    assert factors.keys() == {position.name for position in POSITIONS}
    for position in POSITIONS:
        lora_A, lora_B = factors[position.name]
        assert lora_A.shape == (3, r, position.in_features)
        assert lora_B.shape == (3, position.out_features, r)


@pytest.mark.parametrize("head", HEADS)
def test_every_row_position_and_task_gets_other_weights(head: str) -> None:
    torch.manual_seed(0)
    for group in make_hypernetwork(head=head)(torch.randn(3, DIM), POSITIONS):
        for rows in (group.lora_A, group.lora_B.mT):
            assert len(torch.unique(rows.flatten(0, 2), dim=0)) == 3 * len(group.positions) * 4


@pytest.mark.parametrize("head", HEADS)
def test_all_tasks_share_factors_of_each_position(head: str) -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(head=head)
    with torch.no_grad():
        for module in hypernetwork.heads.values():
            module.weight.zero_()
    embeddings = torch.randn(3, DIM)
    factors = by_name(hypernetwork(embeddings, POSITIONS))
    assert len({tuple(lora_A[0].flatten().tolist()) for lora_A, _ in factors.values()}) == len(POSITIONS)
    for name, (lora_A, lora_B) in factors.items():
        position = next(position for position in POSITIONS if position.name == name)
        assert torch.equal(lora_A, lora_A[:1].expand_as(lora_A))
        assert torch.equal(lora_B, lora_B[:1].expand_as(lora_B))
        # Also where the position is generated without the others.
        alone = by_name(hypernetwork(embeddings, [position]))[name]
        assert torch.equal(alone[0], lora_A)
        assert torch.equal(alone[1], lora_B)
    parameters = sum(position.r * (position.in_features + position.out_features) for position in POSITIONS)
    assert sum(shared.numel() for shared in hypernetwork.shared.values()) == parameters


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ("row", {"A_6_r4", "A_10_r4", "B_3_r4", "B_6_r4", "B_10_r4"}),
        ("factor", {"A_6_r4", "A_10_r4", "B_3_r4", "B_6_r4", "B_10_r4"}),
        ("pair", {f"{factor}_{shape}_r4" for factor in "AB" for shape in ("6x6", "6x10", "10x6", "6x3")}),
    ],
)
def test_heads_are_shared_as_documented(head: str, keys: set[str]) -> None:
    heads = make_hypernetwork(head=head).heads
    assert set(heads) == keys
    for key, module in heads.items():
        in_features, _, out_features = key[2:].removesuffix("_r4").rpartition("x")
        size = int(in_features if key[0] == "A" and in_features else out_features)
        assert module.weight.shape == (size if head == "row" else 4 * size, 16)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("members", [[3], [8, 0], [5, 1, 3, 2]])
def test_some_positions_equal_that_part_of_all(head: str, members: list[int]) -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(head=head)
    embeddings = torch.randn(3, DIM)
    whole = by_name(hypernetwork(embeddings, POSITIONS))
    some = [POSITIONS[member] for member in members]
    part = by_name(hypernetwork(embeddings, some))
    assert part.keys() == {position.name for position in some}
    expected = {name: whole[name] for name in part}
    torch.testing.assert_close(part, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("head", HEADS)
def test_tasks_in_a_batch_equal_tasks_one_at_a_time(head: str) -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(head=head)
    embeddings = torch.randn(3, DIM)
    together = by_name(hypernetwork(embeddings, POSITIONS))
    for task in range(3):
        alone = by_name(hypernetwork(embeddings[task : task + 1], POSITIONS))
        expected = {name: (A[task : task + 1], B[task : task + 1]) for name, (A, B) in together.items()}
        torch.testing.assert_close(alone, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("length", [1.0, 1e4], ids=["unit", "long"])
def test_only_the_direction_of_an_embedding_counts(length: float) -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork()
    embeddings = torch.randn(3, DIM)
    expected = by_name(hypernetwork(embeddings, POSITIONS))

    scaled = length * torch.nn.functional.normalize(embeddings, dim=1)
    actual = by_name(hypernetwork(scaled, POSITIONS))
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)

    with torch.no_grad():
        hypernetwork.layer_embedding *= length
        hypernetwork.module_embedding *= length
    actual = by_name(hypernetwork(embeddings, POSITIONS))
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    opposite = by_name(hypernetwork(-embeddings, POSITIONS))
    assert not torch.equal(opposite["h.0.q"][0], expected["h.0.q"][0])


@pytest.mark.parametrize("head", HEADS)
def test_initial_factors_keep_the_variance_of_activations(head: str) -> None:
    r, in_features, out_features, seeds, inputs = 16, 96, 64, 100, 1000
    position = Position("h.0.q", in_features, out_features, r)
    squares = torch.zeros(4)
    for seed in range(seeds):
        torch.manual_seed(seed)
        hypernetwork = make_hypernetwork([position], head=head)
        with torch.no_grad():
            [group] = hypernetwork(torch.randn(1, DIM), [position])
        lora_A, lora_B = group.lora_A, group.lora_B
        hidden = torch.randn(inputs, in_features) @ lora_A[0, 0].T
        # Of unit variance by itself, so that A's deviation does not count for B.
        output = torch.randn(inputs, r) @ lora_B[0, 0].T
        squares += torch.stack([tensor.square().mean() for tensor in (lora_A, lora_B, hidden, output)])
    variance_A, variance_B, variance_hidden, variance_output = (squares / seeds).tolist()

    # Entries that one head emits at once are independent; a "row" head emits one row (or column) at a time,
    # and its rows are averaged on top.
    rows = 1 if head == "row" else r
    error_A = sample_variance_error(seeds * rows * in_features)
    error_B = sample_variance_error(seeds * rows * out_features)
    error_inputs = sample_variance_error(seeds * inputs)
    assert variance_A * in_features == pytest.approx(1, abs=error_A)
    assert variance_B * r == pytest.approx(1, abs=error_B)
    assert variance_hidden == pytest.approx(1, abs=error_A + error_inputs)
    assert variance_output == pytest.approx(1, abs=error_B + error_inputs)


def test_a_heads_output_has_the_given_variance() -> None:
    torch.manual_seed(0)
    size, variance = 20_000, 0.25
    head = Head(16, size, variance=variance)
    z = torch.nn.functional.rms_norm(torch.randn(16), (16,))
    error = variance * sample_variance_error(size)
    with torch.no_grad():
        assert head(z).square().mean().item() == pytest.approx(variance, abs=error)


@pytest.mark.parametrize("head", HEADS)
def test_zero_heads_emit_exactly_zero_b_and_train(head: str) -> None:
    hypernetwork = make_hypernetwork(head=head, variance_B=0.0)
    factors = by_name(hypernetwork(torch.randn(3, DIM), POSITIONS))
    for lora_A, lora_B in factors.values():
        assert torch.equal(lora_B, torch.zeros_like(lora_B))
        assert (lora_A != 0).all()
    sum(lora_B.sum() for _, lora_B in factors.values()).backward()
    for key, module in hypernetwork.heads.items():
        if key.startswith("B"):
            assert (module.weight.grad != 0).all()
    for key, shared in hypernetwork.shared.items():
        if key.startswith("B"):
            assert (shared.grad != 0).all()


@pytest.mark.parametrize("dim", [16, 256])
def test_one_adam_step_moves_a_heads_output_by_the_learning_rate_at_any_width(dim: int) -> None:
    torch.manual_seed(0)
    lr = 0.01
    head = Head(dim, 50, variance=1 / 50)
    z = torch.nn.functional.rms_norm(torch.randn(dim), (dim,))
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    before = head(z)
    before.sum().backward()
    optimizer.step()
    with torch.no_grad():
        step = (head(z) - before).abs()
    expected = torch.full((50,), lr * z.abs().mean().item())
    torch.testing.assert_close(step, expected, rtol=ADAM_FIRST_STEP, atol=FLOAT32_DIFFERENCE)
    assert step.max() < lr


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that are dispatched while it is active."""

    NAMES = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", HEADS)
def test_the_number_of_matrix_products_does_not_grow_with_layers_or_tasks(head: str) -> None:
    counts = []
    for layers, tasks in ((2, 1), (6, 1), (6, 5)):
        positions = [Position(f"h.{i}.{name}", *SHAPES[name], r=4) for i in range(layers) for name in SHAPES]
        hypernetwork = make_hypernetwork(positions, head=head)
        with CountProducts() as products:
            hypernetwork(torch.randn(tasks, DIM), positions)
        counts.append(products.count)
    # One per input (and the gate), two per residual block, and two per shape.
    inputs = 5 if head == "row" else 4
    assert counts == [inputs + 2 * 2 + 2 * len(set(SHAPES.values()))] * 3


@pytest.mark.parametrize("head", HEADS)
def test_a_gate_tells_tasks_apart(head: str) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(10, DIM)
    cosines = {}
    for conditioning in ("additive", "gated"):
        hypernetwork = make_hypernetwork(head=head, hypernetwork_dim=64, conditioning=conditioning)
        hidden = hypernetwork._hidden(embeddings, POSITIONS).detach()
        assert_close(
            hidden.square().mean(-1), torch.ones(hidden.shape[:-1]), rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA
        )
        directions = torch.nn.functional.normalize(hidden.flatten(1), dim=1)
        products = directions @ directions.T
        cosines[conditioning] = float(products[~torch.eye(10, dtype=torch.bool)].mean())
    # Tasks share layers, modules and the trunk; a gate has independent entries, with a mean cosine near zero.
    assert cosines["additive"] > 0.4
    assert abs(cosines["gated"]) < 0.2


def test_a_gate_is_the_only_difference() -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(conditioning="gated")
    embeddings = torch.randn(3, DIM)
    gated = hypernetwork._hidden(embeddings, POSITIONS)
    gate = hypernetwork._project("gate", embeddings)
    hypernetwork.is_gated = False
    expected = hypernetwork._hidden(embeddings, POSITIONS) * gate[:, None, None]
    expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
    assert_close(gated, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("r", [1, 4])
def test_bilinear_conditioning_compares_activations_with_the_embedding(head: str, r: int) -> None:
    torch.manual_seed(0)
    experts = Position("h.1.experts", 6, 10, r=4, experts=3)
    positions = [replace(position, r=r) for position in (*POSITIONS, experts)]
    hypernetwork = make_hypernetwork(positions, head=head, task_embedding_dim=6, conditioning="bilinear")
    embeddings = torch.randn(3, 6)
    directions = embeddings / embeddings.square().mean(-1, keepdim=True).sqrt()
    generated = hypernetwork(embeddings, positions)
    for group in generated:
        first, size = group.positions[0], group.lora_A.shape[-1]
        assert group.lora_A.shape == (3, group.weights, r, size)
        if size != 6:
            continue
        # At the start, all entries alike, with the weight of half of the rows.
        expected = directions[:, None].expand(3, group.weights, 6) * (0.5 * r / 6) ** 0.5
        assert_close(group.lora_A[:, :, 0], expected, rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
        if first.experts:
            assert not torch.equal(group.lora_B[:, 0], group.lora_B[:, 2])
    # All else is generated as ever.
    hypernetwork._matched_size = None
    for group, other in zip(generated, hypernetwork(embeddings, positions), strict=True):
        rows = slice(1 if group.lora_A.shape[-1] == 6 else 0, None)
        assert torch.equal(group.lora_A[:, :, rows], other.lora_A[:, :, rows])
        assert torch.equal(group.lora_B, other.lora_B)


def test_scales_of_the_embedding_are_trained() -> None:
    torch.manual_seed(0)
    hypernetwork = make_hypernetwork(task_embedding_dim=6, conditioning="bilinear")
    embeddings = torch.randn(3, 6, requires_grad=True)
    [first, *_] = hypernetwork(embeddings, POSITIONS[:1])
    first.lora_A[:, 0, 0].sum().backward()
    directions = embeddings.detach() / embeddings.detach().square().mean(-1, keepdim=True).sqrt()
    gradient = hypernetwork.shared["A_6x6_r4"].grad
    assert_close(gradient[0, 0], directions.sum(0), rtol=FLOAT32_FORMULA, atol=FLOAT32_FORMULA)
    assert not gradient[1:].any()
    assert embeddings.grad.any()


def test_bilinear_conditioning_needs_a_layer_of_the_embeddings_size() -> None:
    with pytest.raises(
        ValueError, match=r"size task_embedding_dim=8; the adapted ones read 6, 10\. Set task_embedding_dim"
    ):
        make_hypernetwork(conditioning="bilinear")
    # Neither indices nor patches are vectors of the model.
    others = [replace(POSITIONS[0], kind="Embedding"), replace(POSITIONS[0], kind="Conv2d", kernel=(1, 1))]
    with pytest.raises(
        ValueError, match=r"size task_embedding_dim=6; the adapted ones read none\. Set task_embedding_dim"
    ):
        make_hypernetwork(others, task_embedding_dim=6, conditioning="bilinear")
