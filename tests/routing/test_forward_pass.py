"""Which rows an activation holds, and that every thread sees its own forward pass."""

import threading

import pytest
import torch

from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.forward_pass import ForwardPass
from tests.support.helpers import MIXED, ROWS, TASKS, adapted_model, example_batch, logits

ROWS_OF_TASKS = torch.tensor([1, 0, 2, 1])
LAYER = Position("layers.0.fc", 6, 6, r=2)

# (batch size of the base model's input, its length, shape of the activation, whether rows can be told apart)
ACTIVATIONS = {
    "tokens": (4, 5, (4, 5, 6), True),
    "pooled": (4, 5, (4, 6), True),
    "encoder before beams": (8, 5, (4, 5, 6), True),
    "beams": (8, 5, (8, 5, 6), True),
    "pooled beams": (8, 5, (8, 6), True),
    "flattened tokens": (4, 5, (20, 6), True),
    "flattened tokens of beams": (8, 5, (40, 6), True),
    "windows": (4, None, (12, 9, 6), True),
    "unknown input": (None, None, (12, 6), True),
    "sequence first": (4, 8, (8, 4, 6), False),
    "shared by all rows": (4, 5, (1, 9, 6), False),
    "subset of the tokens": (4, 5, (8, 6), False),
    "no multiple": (4, 5, (6, 5, 6), False),
    "unknown input, no multiple": (None, None, (6, 6), False),
}


@pytest.mark.parametrize(("batch_size", "length", "shape", "known"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_rows_of_an_activation(batch_size: int | None, length: int | None, shape: tuple[int, ...], known: bool) -> None:
    call, x = ForwardPass({}, batch_size=batch_size, length=length), torch.zeros(shape)
    if known:
        repeats = shape[0] // len(ROWS_OF_TASKS)
        expected = [int(task) for task in ROWS_OF_TASKS for _ in range(repeats)]
        assert call.rows_of(ROWS_OF_TASKS, x, LAYER).tolist() == expected
    else:
        with pytest.raises(ValueError, match=r"'layers.0.fc' got an input of shape \(.*the 4 rows.*exclude_modules"):
            call.rows_of(ROWS_OF_TASKS, x, LAYER)


def test_experts_are_refused_even_where_the_number_of_their_tokens_fits() -> None:
    call, expert = ForwardPass({}, batch_size=4, length=5), Position("layers.0.experts.3.w1", 6, 6, r=2)
    with pytest.raises(ValueError, match=r"experts.3.w1.*cannot be told apart"):
        call.rows_of(ROWS_OF_TASKS, torch.zeros(4, 6), expert)


def test_only_the_first_input_must_have_a_row_per_task() -> None:
    call = ForwardPass({}, num_rows=4)
    call.observe(torch.zeros(4, 5, dtype=torch.long))
    call.observe(torch.zeros(12, 1, dtype=torch.long))
    assert (call.batch_size, call.length) == (12, 1)
    with pytest.raises(ValueError, match="Got tasks for 4 rows, but the batch has 12"):
        ForwardPass({}, num_rows=4).observe(torch.zeros(12, 1, dtype=torch.long))


def test_threads_do_not_mix_their_tasks() -> None:
    model, batch = adapted_model("llama"), example_batch("llama", labels=False)
    choices = [*TASKS, MIXED, MIXED[::-1], [TASKS[0]] * ROWS]
    expected = [logits(model, batch, tasks=tasks) for tasks in choices]
    wrong: list[object] = []

    def repeat(index: int) -> None:
        for _ in range(20):
            if not torch.equal(logits(model, batch, tasks=choices[index]), expected[index]):
                wrong.append(choices[index])

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
