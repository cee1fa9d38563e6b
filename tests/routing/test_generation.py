"""Generation: rows keep their tasks through the key-value cache, beams and several returned sequences."""

import contextvars
import copy
from threading import Thread
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hyperadapt import use_tasks
from tests.support.helpers import MIXED, TASK_TYPES, adapted_model, base_model, example_batch, row_of

NAMES = ("gpt2", "llama", "t5")
EACH = pytest.mark.parametrize("name", NAMES)
BEAMS = {"num_beams": 3}
SEARCHES = {
    "greedy": {},
    "beams": BEAMS,
    "returned beams": BEAMS | {"num_return_sequences": 2},
}


def prompts(name: str) -> dict[str, Tensor]:
    return example_batch(name, labels=False, seed=1) if name != "t5" else encoder_inputs()


def encoder_inputs() -> dict[str, Tensor]:
    batch = example_batch("t5", seed=1)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def generate(model: PeftModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(**inputs, **settings)


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    """In float64, so that a near tie cannot be decided by rounding."""
    # A large bound, so that tasks give other tokens.
    return {name: adapted_model(name, task_type=TASK_TYPES[name], normalization_bound=4.0).double() for name in NAMES}


@EACH
@pytest.mark.parametrize("search", SEARCHES)
def test_mixed_batch_equals_its_rows(models: dict[str, PeftModel], name: str, search: str) -> None:
    model, inputs, options = models[name], prompts(name), SEARCHES[search]
    together = generate(model, inputs, tasks=MIXED, **options)
    per_row = options.get("num_return_sequences", 1)
    assert len(together) == len(MIXED) * per_row
    for row, task in enumerate(MIXED):
        alone = generate(model, row_of(inputs, row), tasks=[task], **options)
        assert torch.equal(together[row * per_row : (row + 1) * per_row], alone)
    assert not torch.equal(together, generate(model, inputs, tasks="gamma", **options))


@EACH
def test_sampled_sequences_keep_their_tasks(models: dict[str, PeftModel], name: str) -> None:
    model, inputs = models[name], prompts(name)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
    # The same draws on a batch that already holds every prompt twice.
    torch.manual_seed(0)
    returned = generate(model, inputs, tasks=MIXED, **options)
    torch.manual_seed(0)
    doubled = {key: value.repeat_interleave(2, dim=0) for key, value in inputs.items()}
    tasks = [task for task in MIXED for _ in range(2)]
    assert torch.equal(returned, generate(model, doubled, tasks=tasks, do_sample=True))
    torch.manual_seed(0)
    assert not torch.equal(returned, generate(model, inputs, tasks="gamma", **options))


@EACH
def test_every_way_to_name_tasks(models: dict[str, PeftModel], name: str) -> None:
    model, inputs = models[name], prompts(name)
    expected = generate(model, inputs, tasks=MIXED)
    with use_tasks(model, MIXED):
        assert torch.equal(generate(model, inputs), expected)
    weight = model.base_model.router.network("default").task_embedding.weight
    ids = torch.tensor([model.peft_config["default"].tasks.index(task) for task in MIXED])
    assert torch.equal(generate(model, inputs, task_embeddings=weight.detach()[ids]), expected)
    one = generate(model, inputs, tasks="beta")
    model = copy.deepcopy(model)
    model.set_task("beta")
    assert torch.equal(generate(model, inputs), one)
    model.merge_adapter()
    assert torch.equal(generate(model, inputs, tasks="beta"), one)
    assert not torch.equal(one, expected)


@EACH
def test_plain_peft_model_and_positional_inputs(models: dict[str, PeftModel], name: str) -> None:
    plain, inputs = adapted_model(name, normalization_bound=4.0).double(), prompts(name)
    expected = generate(models[name], inputs, tasks=MIXED)
    assert torch.equal(generate(plain, inputs, tasks=MIXED), expected)
    ids = inputs.pop("input_ids")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids, **inputs, tasks=MIXED, **options), expected)
    with plain.disable_adapter():
        disabled = plain.generate(ids, **inputs, tasks=MIXED, **options)
    assert torch.equal(disabled, base_model(name).double().generate(ids, **inputs, **options))


@EACH
@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
def test_wrong_number_of_tasks(models: dict[str, PeftModel], name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Got tasks for 3 rows, but the batch has 4"):
        generate(models[name], prompts(name), tasks=MIXED[:3], **options)
    # As many tasks as beams in all is not one task per row either.
    with pytest.raises(ValueError, match="Got tasks for 12 rows, but the batch has 4"):
        generate(models[name], prompts(name), tasks=MIXED * 3, **options)
    assert models[name].base_model.router.current is None


def test_factors_are_generated_once_per_call() -> None:
    model = adapted_model("llama")
    calls: list[int] = []
    model.base_model.router.network("default").register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompts("llama"), tasks=MIXED)
    assert len(calls) == 1


def test_embeddings_as_prompt(models: dict[str, PeftModel]) -> None:
    model, inputs = models["llama"], prompts("llama")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    together = generate(model, inputs | {"inputs_embeds": embeds}, tasks=MIXED)
    row = generate(model, row_of(inputs | {"inputs_embeds": embeds}, 1), tasks=[MIXED[1]])
    assert torch.equal(together[1:2], row)
    with pytest.raises(ValueError, match="Got tasks for 3 rows, but the batch has 4"):
        generate(model, inputs | {"inputs_embeds": embeds}, tasks=MIXED[:3])


def test_encoder_outputs_as_prompt(models: dict[str, PeftModel]) -> None:
    model, inputs = models["t5"], prompts("t5")
    expected = generate(model, inputs, tasks=MIXED, **BEAMS)
    with torch.no_grad(), use_tasks(model, MIXED):
        encoded = model.get_encoder()(**inputs)
    del inputs["input_ids"]
    assert torch.equal(generate(model, inputs, encoder_outputs=encoded, tasks=MIXED, **BEAMS), expected)


def test_a_prefix_from_the_cache(models: dict[str, PeftModel]) -> None:
    model, inputs = models["llama"], prompts("llama")
    expected = generate(model, inputs, tasks=MIXED)
    with torch.no_grad():
        prefix = model(**{key: value[:, :4] for key, value in inputs.items()}, tasks=MIXED, use_cache=True)
    assert torch.equal(generate(model, inputs, tasks=MIXED, past_key_values=prefix.past_key_values), expected)


@pytest.mark.parametrize("assistant", ["base", "another adapter", "prompt"])
def test_assisted_decoding_gives_the_same_tokens(models: dict[str, PeftModel], assistant: str) -> None:
    model, inputs = models["llama"], row_of(prompts("llama"), 1)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if assistant == "base":
        options = {"assistant_model": base_model("llama").double()}
    elif assistant == "another adapter":
        helper = adapted_model("llama", task_type="CAUSAL_LM", seed=4, tasks=["one", "two"]).double()
        helper.set_task("two")
        options = {"assistant_model": helper}
    expected = generate(model, inputs, tasks="beta")
    assert torch.equal(generate(model, inputs, tasks="beta", **options), expected)


class Heard(BaseStreamer):
    """The tokens of a row, as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("how", ["tasks", "pinned", "use_tasks"])
def test_streaming_from_a_thread(models: dict[str, PeftModel], how: str) -> None:
    model, inputs = copy.deepcopy(models["llama"]), row_of(prompts("llama"), 1)
    expected, heard = generate(model, inputs, tasks="beta")[0].tolist(), Heard()
    options: dict[str, Any] = {"streamer": heard} | ({"tasks": "beta"} if how == "tasks" else {})
    if how == "pinned":
        model.set_task("beta")
    if how == "use_tasks":
        with use_tasks(model, "beta"):
            inside = contextvars.copy_context()
            run_in_a_thread(lambda: inside.run(generate, model, inputs, **options))
    else:
        run_in_a_thread(lambda: generate(model, inputs, **options))
    assert heard.tokens == expected


def run_in_a_thread(function: Any) -> None:
    thread = Thread(target=function)
    thread.start()
    thread.join()
