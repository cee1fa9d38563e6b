"""Each text is encoded with its own task, or the call is refused."""

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", "6.2", reason="sentence-transformers 6.2 is not installed")

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, TripletEvaluator
from torch.testing import assert_close

from hyperadapt import use_tasks
from hyperadapt.tuner.active import active_network
from tests.support.embedding_models import TEXT_TASKS, TEXTS, adapted, plain
from tests.support.helpers import TASKS
from tests.support.tolerances import FLOAT32_FORWARD


@pytest.fixture(scope="module")
def model(base: str) -> SentenceTransformer:
    return adapted(base)


def pinned(model: SentenceTransformer, task: str, texts: Any) -> np.ndarray:
    """Vectors by the hyperadapter with one task for all that it does."""
    model.transformers_model.set_task(task)
    try:
        return model.encode(texts)
    finally:
        model.transformers_model.set_task(None)


def alone(model: SentenceTransformer) -> np.ndarray:
    return np.stack([pinned(model, task, text) for text, task in zip(TEXTS, TEXT_TASKS, strict=True)])


def assert_same(first: Any, second: Any) -> None:
    assert_close(torch.as_tensor(first), torch.as_tensor(second), rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_texts_keep_their_tasks_through_sorting_and_batches(model: SentenceTransformer, batch_size: int) -> None:
    expected = alone(model)
    assert_same(model.encode(TEXTS, tasks=TEXT_TASKS, batch_size=batch_size), expected)
    assert np.abs(expected - pinned(model, "alpha", TEXTS)).max() > 1e-2


def test_all_ways_to_give_texts_and_tasks(model: SentenceTransformer) -> None:
    expected, beta = alone(model), pinned(model, "beta", TEXTS)
    ids = torch.tensor([TASKS.index(task) for task in TEXT_TASKS])
    assert_same(model.encode(np.array(TEXTS), tasks=ids), expected)
    assert_same(model.encode(TEXTS, None, None, 2, tasks=tuple(TEXT_TASKS)), expected)
    assert_same(model.encode(TEXTS[0], tasks=["beta"]), expected[0])
    assert_same(model.encode(sentences=TEXTS, tasks=TEXT_TASKS), expected)
    tokens = model.encode(TEXTS, tasks=TEXT_TASKS, output_value="token_embeddings")
    assert_same(tokens[1].mean(0) / tokens[1].mean(0).norm(), expected[1])
    for named in ({"tasks": "beta"}, {"task": "beta"}, {"prompt_name": "beta"}):
        assert_same(model.encode(TEXTS, **named), beta)
    with use_tasks(model, "beta"):
        assert_same(model.encode(TEXTS), beta)
        assert_same(model.encode(TEXTS, tasks=TEXT_TASKS), expected)
    assert len(model.encode([], tasks="beta")) == 0


def test_prompts_come_before_texts_with_tasks(model: SentenceTransformer) -> None:
    expected = model.encode([f"green {text}" for text in TEXTS], tasks=TEXT_TASKS)
    assert_same(model.encode(TEXTS, prompt="green ", tasks=TEXT_TASKS), expected)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(model: SentenceTransformer) -> None:
    parameters = [one for one in model.parameters() if one.requires_grad]
    weights = torch.randn(len(TEXTS), 32, generator=torch.Generator().manual_seed(1))

    def gradients(texts: list[str], rows: torch.Tensor, tasks: Any) -> tuple[torch.Tensor, ...]:
        vectors = model(model.preprocess(texts, tasks=tasks))["sentence_embedding"]
        return torch.autograd.grad((vectors * rows).sum(), parameters)

    mixed = gradients(TEXTS, weights, TEXT_TASKS)
    rows = [gradients([TEXTS[i]], weights[i : i + 1], TEXT_TASKS[i]) for i in range(len(TEXTS))]
    for index, gradient in enumerate(mixed):
        assert_close(gradient, sum(row[index] for row in rows), rtol=10 * FLOAT32_FORWARD, atol=10 * FLOAT32_FORWARD)
    assert max(gradient.abs().max() for gradient in mixed) > 1e-2


@pytest.mark.multi_process
def test_tasks_reach_the_processes_of_a_pool(model: SentenceTransformer) -> None:
    # Its first task is pinned, to no effect where texts have their own.
    model.transformers_model.set_task("alpha")
    pool = model.start_multi_process_pool(["cpu"])
    try:
        encoded = model.encode(TEXTS, tasks=TEXT_TASKS, pool=pool, chunk_size=2)
        model.transformers_model.set_task("gamma")
        pinned_later = model.encode(TEXTS, pool=pool)
        with (
            use_tasks(model, task_embeddings=torch.ones(8)),
            pytest.raises(ValueError, match="use_tasks has a task embedding, which does not reach the processes"),
        ):
            model.encode(TEXTS, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
        model.transformers_model.set_task(None)
    assert_same(encoded, alone(model))
    assert_same(pinned_later, pinned(model, "gamma", TEXTS))


def test_queries_and_documents_have_the_tasks_of_that_name(base: str) -> None:
    model = adapted(base, ["query", "document", "other"])
    query, document = (model.encode(TEXTS, tasks=task) for task in ("query", "document"))
    assert_same(model.encode_query(TEXTS), query)
    assert_same(model.encode_document(TEXTS), document)
    assert np.abs(query - document).max() > 1e-2
    other = model.encode(TEXTS, tasks="other")
    # What is said in the call counts more than use_tasks, and that more than the method's name.
    assert_same(model.encode_query(TEXTS, tasks="other"), other)
    assert_same(model.encode_query(TEXTS, prompt_name="other"), other)
    with use_tasks(model, "other"):
        assert_same(model.encode_query(TEXTS), other)
    model.transformers_model.set_task("other")
    with pytest.raises(ValueError, match=r"for the task 'query', but 'other' is pinned.*set_task\(None\)"):
        model.encode_query(TEXTS)
    assert model.similarity(query, document).shape == (len(TEXTS), len(TEXTS))


def test_evaluators_use_tasks_by_name(base: str) -> None:
    model = adapted(base, ["query", "document", "other"])
    ids = [str(index) for index in range(len(TEXTS))]
    corpus, wanted = dict(zip(ids, TEXTS, strict=True)), {"0": {"0"}}
    queries = {"0": "red green"}
    small: dict[str, Any] = {
        "mrr_at_k": [2], "ndcg_at_k": [2], "accuracy_at_k": [1], "precision_recall_at_k": [1], "map_at_k": [2]
    }  # fmt: skip
    seen: list[tuple[str, int]] = []
    transformer, preprocess = model[0], model[0].preprocess

    def noting(inputs: Any, **kwargs: Any) -> Any:
        features = preprocess(inputs, **kwargs)
        seen.append((features["tasks"], len(inputs)))
        return features

    transformer.preprocess = noting
    InformationRetrievalEvaluator(queries, corpus, wanted, **small)(model)
    assert seen == [("query", 1), ("document", len(TEXTS))]
    seen.clear()
    InformationRetrievalEvaluator(queries, corpus, wanted, corpus_prompt_name="other", **small)(model)
    assert seen == [("query", 1), ("other", len(TEXTS))]
    seen.clear()
    with use_tasks(model, "other"):
        TripletEvaluator(TEXTS[:2], TEXTS[2:4], TEXTS[3:5])(model)
    assert seen == [("other", 2)] * 3


def test_tasks_that_are_added_later(base: str) -> None:
    model = adapted(base)
    model.transformers_model.add_task("delta", embedding=torch.ones(8))
    assert_same(model.encode(TEXTS, prompt_name="delta"), model.encode(TEXTS, tasks="delta"))


def test_a_default_prompt_names_a_task(base: str) -> None:
    model = adapted(base)
    expected = model.encode(TEXTS, tasks="gamma")
    model.default_prompt_name = "gamma"
    assert_same(model.encode(TEXTS), expected)


def test_an_only_task_needs_no_name(base: str) -> None:
    model = adapted(base, ["alpha"])
    expected = model.encode(TEXTS, tasks="alpha")
    assert_same(model.encode(TEXTS), expected)
    assert np.abs(expected - plain(base).encode(TEXTS)).max() > 1e-2


def test_a_copy_uses_its_own_adapter(base: str) -> None:
    model = adapted(base)
    other = copy.deepcopy(model)
    before = model.encode(TEXTS, tasks=TEXT_TASKS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert_same(model.encode(TEXTS, tasks=TEXT_TASKS), before)
    assert np.abs(other.encode(TEXTS, tasks=TEXT_TASKS) - before).max() > 1e-3


def test_a_merged_task_is_the_task_in_force(base: str) -> None:
    model = adapted(base)
    expected = model.encode(TEXTS, tasks="beta")
    model.transformers_model.set_task("beta")
    model.transformers_model.merge_adapter()
    assert_same(model.encode(TEXTS), expected)
    with pytest.raises(ValueError, match="Task 'beta' of adapter 'default' is merged"):
        model.encode(TEXTS, tasks=TEXT_TASKS)


def test_an_embedding_can_be_the_condition(model: SentenceTransformer) -> None:
    _, network = active_network(model)
    embedding = network.task_embedding(torch.tensor([TASKS.index("beta")])).detach()[0]
    with use_tasks(model, task_embeddings=embedding):
        assert_same(model.encode(TEXTS), pinned(model, "beta", TEXTS))


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": (
        {},
        ValueError,
        r"tasks \['alpha', 'beta', 'gamma'\], and encode was not told which the texts are for. Pass tasks=",
    ),
    "too few": ({"tasks": TEXT_TASKS[:2]}, ValueError, "Got tasks for 2 texts, but there are 5. Pass one task per"),
    "unknown": ({"tasks": "delta"}, ValueError, "Unknown task 'delta'. Known tasks: "),
    "unknown in list": ({"tasks": [*TEXT_TASKS[:4], "delta"]}, ValueError, "Unknown task 'delta'. Known tasks: "),
    "unknown task": ({"task": "delta"}, ValueError, "Unknown task 'delta'. Known tasks: "),
    "two names": (
        {"task": "alpha", "prompt_name": "beta"},
        ValueError,
        "task='alpha' and prompt_name='beta' are two tasks of this model. Pass one of them",
    ),
    "no names": ({"tasks": 3}, TypeError, "tasks=3 must be a task name, a list of names"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_that_are_not_clear_are_refused(model: SentenceTransformer, name: str) -> None:
    options, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        model.encode(TEXTS, **options)


def test_other_inputs_take_one_task_per_call(model: SentenceTransformer) -> None:
    pairs = [("red", "green"), ("blue", "red")]
    assert model.encode(pairs, tasks="alpha").shape == (2, 32)
    with pytest.raises(TypeError, match=r"needs texts, but one is a tuple. Encode the inputs of each"):
        model.encode(pairs, tasks=["alpha", "beta"])


def test_a_list_in_use_tasks_goes_to_encode(model: SentenceTransformer) -> None:
    with (
        use_tasks(model, TEXT_TASKS),
        pytest.raises(ValueError, match="use_tasks has a task for each of 5 rows, but encode may be called several"),
    ):
        model.encode(TEXTS)


def test_a_batch_without_tasks_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"a batch does not say which of them it is for. Call encode with tasks="):
        model(model.preprocess(TEXTS))
    with pytest.raises(ValueError, match="Got tasks for 2 texts, but there are 5"):
        model.preprocess(TEXTS, tasks=TEXT_TASKS[:2])
