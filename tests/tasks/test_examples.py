"""The rows that a task's condition is made of, and the encoder that reads a set of them."""

import copy

import pytest
import torch
from torch import Tensor

from hyperadapt.tasks.embedding import TaskEmbedding
from hyperadapt.tasks.examples import MAX_EXAMPLES, ExampleEncoder, ExampleRows
from tests.support.tolerances import FLOAT32_FORMULA

DIM, CLASSES = 6, 3
CLOSE = {"rtol": FLOAT32_FORMULA, "atol": FLOAT32_FORMULA}


def labelled(classes: list[int], seed: int = 0) -> Tensor:
    """Raw vectors of rows with these classes."""
    generator = torch.Generator().manual_seed(seed)
    features = 5 + 3 * torch.randn(len(classes), DIM, generator=generator)
    return torch.cat([features, torch.eye(CLASSES)[classes]], 1)


def pairs(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2 * DIM, generator=torch.Generator().manual_seed(seed))


def encoder(classes: int | None = CLASSES, is_direct: bool = False) -> ExampleEncoder:
    torch.manual_seed(0)
    made = ExampleEncoder(DIM, classes, DIM if is_direct else 8, is_direct)
    made.fit_scales(labelled([0, 1, 2] * 20, 1) if classes else pairs(60, 1))
    return made


def padded(vectors: Tensor) -> Tensor:
    return torch.cat([vectors, vectors.new_zeros(MAX_EXAMPLES - len(vectors), vectors.shape[1])])[None]


def read(made: ExampleEncoder, raw: Tensor) -> Tensor:
    return made(padded(made.scaled(raw)))[0]


def beside(vector: Tensor, other: Tensor) -> Tensor:
    """A vector without its part along another."""
    return vector - (vector @ other) / (other @ other) * other


def test_a_direct_encoder_starts_as_the_contrast_of_the_classes() -> None:
    made, raw = encoder(is_direct=True), labelled([0, 2, 2, 0, 2])
    scaled, (mean, deviation) = made.scaled(raw)[:, :DIM], (made.mean[:DIM], made.deviation[:DIM])
    means = [scaled[raw[:, DIM + one] == 1].mean(0) * deviation for one in (0, 2)]
    # As far as lengths of rows are left aside, in the space of the features.
    direction = raw[raw[:, DIM + 2] == 1][:, :DIM].mean(0) - raw[raw[:, DIM] == 1][:, :DIM].mean(0)
    start = read(made, raw)
    middle = mean + (means[0] + means[1]) / 2
    assert mean.abs().min() > 1
    # What lies in the middle of the classes is worth nothing; what is left is the contrast.
    assert torch.cosine_similarity(start, middle, dim=0).abs() < FLOAT32_FORMULA
    assert torch.cosine_similarity(start, beside(means[1] - means[0], middle), dim=0) > 1 - FLOAT32_FORMULA
    assert torch.cosine_similarity(start, beside(direction, middle), dim=0) > 0.8
    start.square().sum().backward()
    assert all(one.grad is not None for one in made.parameters())
    assert made.readout.weight.grad.any()
    # Elsewhere nothing can be compared.
    assert all(ExampleEncoder(*sizes, True).contrast is None for sizes in ((DIM, CLASSES, 8), (DIM, None, DIM)))


@pytest.mark.parametrize(("classes", "is_direct"), [(CLASSES, False), (CLASSES, True), (None, False)])
def test_the_order_of_examples_does_not_count(classes: int | None, is_direct: bool) -> None:
    made = encoder(classes, is_direct)
    # Away from the start, all of it counts.
    torch.nn.init.normal_(made.readout.weight)
    raw = labelled([0, 1, 1, 2, 0, 1]) if classes else pairs(6)
    expected = read(made, raw)
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(read(made, raw[order]), expected, **CLOSE)
    # Nor where rows of zeros stand among them.
    scattered = torch.zeros(1, MAX_EXAMPLES, raw.shape[1])
    scattered[0, torch.arange(6) * 5] = made.scaled(raw)
    assert torch.allclose(made(scattered)[0], expected, **CLOSE)


def test_other_answers_make_another_condition() -> None:
    made, raw = encoder(), labelled([0, 1, 0, 1])
    swapped = torch.cat([raw[:, :DIM], raw[:, DIM:][:, [1, 0, 2]]], 1)
    assert torch.cosine_similarity(read(made, raw), read(made, swapped), dim=0) < 0.9
    made, raw = encoder(None), pairs(4)
    crossed = torch.cat([raw[:, :DIM], raw[[1, 2, 3, 0], DIM:]], 1)
    assert torch.cosine_similarity(read(made, raw), read(made, crossed), dim=0) < 0.99


def test_every_class_counts_the_same() -> None:
    made, raw = encoder(), labelled([0, 1])
    assert torch.allclose(read(made, raw[[0, 1, 1, 1, 1]]), read(made, raw), **CLOSE)
    made, raw = encoder(None), pairs(2)
    assert torch.allclose(read(made, raw[[0, 1, 0, 1]]), read(made, raw), **CLOSE)
    assert not torch.allclose(read(made, raw[[0, 1, 1, 1]]), read(made, raw), atol=1e-3)


def test_features_are_centred_and_their_size_does_not_count() -> None:
    made = ExampleEncoder(DIM, CLASSES, 8)
    raw = labelled([0, 1, 2] * 30)
    # An entry that is the same in all rows.
    raw[:, 2] = 7.0
    made.fit_scales(raw)
    scaled = made.scaled(raw)
    assert torch.equal(scaled[:, DIM:], raw[:, DIM:])
    assert not scaled[:, 2].any()
    assert torch.allclose(scaled[:, :DIM].square().mean(1), torch.ones(len(raw)), atol=1e-3)
    other = copy.deepcopy(made)
    other.fit_scales(torch.cat([raw[:, :DIM] * 10 - 4, raw[:, DIM:]], 1))
    assert torch.allclose(other.scaled(torch.cat([raw[:, :DIM] * 10 - 4, raw[:, DIM:]], 1)), scaled, atol=1e-4)


@pytest.mark.parametrize("classes", [CLASSES, None])
def test_gradients_reach_every_parameter_and_are_right(classes: int | None) -> None:
    made = encoder(classes).double()
    vectors = torch.cat([padded(made.scaled(labelled([0, 1, 1]) if classes else pairs(3))) for _ in range(2)])
    vectors[1, 2] = 0.0
    parameters = {name: value.detach().clone().requires_grad_() for name, value in made.named_parameters()}

    def outcome(*values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(parameters, values, strict=True)), (vectors,))

    assert torch.autograd.gradcheck(outcome, tuple(parameters.values()))
    outcome(*parameters.values()).square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in parameters.values())


def rows_of(*tasks: list[int]) -> ExampleRows:
    rows = ExampleRows(len(tasks), DIM + CLASSES, CLASSES)
    banks = [labelled(classes, seed) for seed, classes in enumerate(tasks)]
    rows.fill(torch.stack([rows.kept(bank) for bank in banks]), banks, is_given=True)
    return rows


def test_of_many_rows_those_of_all_classes_are_kept() -> None:
    rows = ExampleRows(1, DIM + CLASSES, CLASSES)
    kept = rows.kept(labelled([0] * 100 + [2] * 20 + [1] * 3))
    assert kept.shape == (MAX_EXAMPLES, DIM + CLASSES)
    assert kept[:, DIM:].sum(0).tolist() == [15.0, 3.0, 14.0]
    few = labelled([1, 0])
    assert torch.equal(rows.kept(few)[:2], few[[1, 0]])
    assert not rows.kept(few)[2:].any()


def test_training_draws_rows_of_every_class() -> None:
    rows = rows_of([0] * 50 + [1] * 3, [2, 1, 0, 0], [1] * 5 + [2] * 5)
    torch.manual_seed(0)
    places = torch.tensor([2, 0, 1]).repeat(300)
    drawn = rows.drawn(places)
    is_row = drawn.any(-1)
    counts = is_row.sum(1)
    known = rows.parts()
    for place in range(3):
        mine = places == place
        classes = known[place][1][:, DIM:].sum(0) > 0
        assert set(counts[mine].tolist()) == set(range(int(classes.sum()), MAX_EXAMPLES + 1))
        found = drawn[mine][..., DIM:].sum(1)
        # Classes take turns, so that their numbers differ by one at most.
        assert ((found > 0) == classes).all()
        assert (found[:, classes].max(1).values - found[:, classes].min(1).values).max() <= 1
        own = {tuple(row) for row in known[place][1].tolist()}
        assert {tuple(row) for row in drawn[mine][is_row[mine]].tolist()} == own


def test_more_classes_than_rows_are_drawn() -> None:
    rows = ExampleRows(1, DIM + 40, 40)
    bank = torch.cat([torch.randn(80, DIM), torch.eye(40).repeat(2, 1)], 1)
    rows.fill(rows.kept(bank)[None], [bank], is_given=True)
    drawn = rows.drawn(torch.zeros(50, dtype=torch.long))
    assert (drawn.any(-1).sum(1) == MAX_EXAMPLES).all()
    assert (drawn[..., DIM:].sum(1).max(1).values == 1).all()
    assert (drawn[..., DIM:].sum((0, 1)) > 0).all()


def test_a_file_holds_what_is_read_and_training_goes_on_with_it() -> None:
    rows = rows_of([0, 1] * 40, [2, 0])
    state = rows.state_dict()
    assert list(state) == ["vectors"]
    loaded = ExampleRows(2, DIM + CLASSES, CLASSES)
    assert not loaded.is_filled
    loaded.load_state_dict(state)
    assert loaded.is_filled
    assert not loaded.is_given
    assert [len(bank) for _, bank in loaded.parts()] == [MAX_EXAMPLES, 2]
    assert loaded.drawn(torch.tensor([0, 1])).isfinite().all()
    # Rows that were given outlast what is loaded after.
    rows.load_state_dict(state)
    assert [len(bank) for _, bank in rows.parts()] == [80, 2]
    # What was saved before there were any is none.
    empty = ExampleRows(2, DIM + CLASSES, CLASSES)
    empty.load_state_dict(ExampleRows(2, DIM + CLASSES, CLASSES).state_dict())
    assert not empty.is_filled


def test_text_and_examples_are_drawn_alone_and_together() -> None:
    table = TaskEmbedding(["text+examples", "examples", "text", "learned"], [1, 0, 1, 0], 8, 4, encoder())
    table.set_text_vectors(torch.eye(4)[:2])
    # A task with one row of each class and as many of each: any draw of whole turns is the same.
    banks = [labelled([0], 1), labelled([1], 2)]
    kept = torch.stack([table.example_rows.kept(bank) for bank in banks])
    table.example_rows.fill(kept, banks, is_given=True)
    text = table.project(torch.eye(4)[0])
    examples = table.example_encoder(kept[:1])[0]
    kinds = {"text": text, "examples": examples, "both": text + examples}
    found = []
    for _ in range(100):
        embedding = table(torch.tensor([0, 1, 2, 3]))[0]
        found += [kind for kind, one in kinds.items() if torch.allclose(embedding, one, rtol=1e-4, atol=1e-4)]
    assert len(found) == 100
    assert all(20 <= found.count(kind) <= 50 for kind in kinds)
    table.eval()
    embeddings = table(torch.tensor([0, 1, 2, 3]))
    assert torch.equal(embeddings[3], table.weight[0])
    assert torch.allclose(embeddings[0], text + examples, **CLOSE)
    assert torch.allclose(embeddings[1], table.example_encoder(kept[1:])[0], **CLOSE)


def test_every_parameter_gets_a_gradient_whatever_the_sources() -> None:
    for ids in ([0], [1], [2], [3, 1]):
        table = TaskEmbedding(["text+examples", "examples", "text", "learned"], [1, 0, 1, 0], 8, 4, encoder())
        table.set_text_vectors(torch.eye(4)[:2])
        banks = [labelled([0, 1], 1), labelled([1, 2], 2)]
        kept = torch.stack([table.example_rows.kept(bank) for bank in banks])
        table.example_rows.fill(kept, banks, is_given=True)
        table(torch.tensor(ids)).sum().backward()
        assert all(parameter.grad is not None for parameter in table.parameters())
