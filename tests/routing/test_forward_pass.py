"""Which rows an activation holds, and that every thread sees its own forward pass."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hyperadapt.hypernetwork.positions import Position
from hyperadapt.routing.forward_pass import ForwardPass
from hyperadapt.routing.layouts import Call, Layout
from hyperadapt.routing.requests import Request
from tests.support.helpers import MIXED, ROWS, TASKS, adapted_model, example_batch, logits

ROWS_OF_TASKS = torch.tensor([1, 0, 2, 1])
LAYER = Position("layers.0.fc", 6, 6, r=2)
SAME, TOKENS = Layout(frozenset({1}), is_constant=True), Layout(frozenset({5}), lengths=frozenset({"input_ids"}))
CALL = Call("", {"input_ids": torch.zeros(4, 5)}, "input_ids", 4)

# (layout, options of generate, rows of the call, elements, the tasks they have; a reason instead)
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any], int, int, list[int] | str]] = {
    "rows": (SAME, {}, 4, 4, [1, 0, 2, 1]),
    "flattened tokens": (TOKENS, {}, 4, 20, [1] * 5 + [0] * 5 + [2] * 5 + [1] * 5),
    "beams": (SAME, {"num_beams": 2}, 8, 8, [1, 1, 0, 0, 2, 2, 1, 1]),
    "returned sequences": (SAME, {"num_return_sequences": 2}, 8, 8, [1, 1, 0, 0, 2, 2, 1, 1]),
    "guidance": (SAME, {"guidance_scale": 3.0}, 8, 8, [1, 0, 2, 1, 1, 0, 2, 1]),
    "guided beams": (SAME, {"guidance_scale": 3.0, "num_beams": 2}, 16, 16, [1, 1, 0, 0, 2, 2, 1, 1] * 2),
    "beams of a configuration": (
        SAME,
        {"generation_config": GenerationConfig(num_beams=2)},
        8,
        8,
        [1, 1, 0, 0, 2, 2, 1, 1],
    ),
    "beams of the model": (
        SAME,
        {"default_generation_config": GenerationConfig(num_beams=2)},
        8,
        8,
        [1, 1, 0, 0, 2, 2, 1, 1],
    ),
    "in blocks": (Layout(frozenset({2}), in_blocks=True), {}, 4, 8, [1, 0, 2, 1] * 2),
    "windows": (Layout(frozenset({2})), {}, 4, 8, [1, 1, 0, 0, 2, 2, 1, 1]),
    "more rows for no reason": (SAME, {}, 8, 8, "called with 8 rows"),
    "other beams": (SAME, {"num_beams": 3}, 8, 8, "called with 8 rows"),
    "some tokens": (TOKENS, {}, 4, 8, "8 elements are not what 4 rows have"),
    "more elements than rows": (SAME, {}, 4, 8, "8 elements are not what 4 rows have"),
    "no multiple": (SAME, {}, 4, 6, "6 elements are not what 4 rows have"),
    "a reason": ("rows keep no order", {}, 4, 4, "rows keep no order"),
    "not called": (None, {}, 4, 4, "it is not called when the model runs on single rows"),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_rows_of_an_activation(case: str) -> None:
    layout, options, num_rows, size, expected = ACTIVATIONS[case]
    inputs = {"input_ids": torch.zeros(num_rows, 5)}
    call = Call("", inputs, "input_ids", num_rows, {} if layout is None else {LAYER.name: layout})
    forward_pass = ForwardPass({}, Request(ROWS_OF_TASKS), options, call=call)
    if isinstance(expected, list):
        assert forward_pass.rows_of(ROWS_OF_TASKS, torch.zeros(size, 6), LAYER).tolist() == expected
    else:
        with pytest.raises(ValueError, match=rf"'layers.0.fc'.*\({size}, 6\).*the 4 rows.*{expected}.*exclude_modules"):
            forward_pass.rows_of(ROWS_OF_TASKS, torch.zeros(size, 6), LAYER)


def test_only_the_first_input_must_have_a_row_per_task() -> None:
    forward_pass = ForwardPass({}, Request(ROWS_OF_TASKS))
    forward_pass.observe(CALL)
    forward_pass.observe(replace(CALL, num_rows=12))
    assert forward_pass.call is not None
    assert forward_pass.call.num_rows == 12
    # Another number of rows in one call of generate: some have left, and nobody knows which.
    assert forward_pass.call.problem == "rows have left the batch since generate began"
    with pytest.raises(ValueError, match="Got tasks for 4 rows, but the batch has 12"):
        ForwardPass({}, Request(ROWS_OF_TASKS)).observe(replace(CALL, num_rows=12))


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
