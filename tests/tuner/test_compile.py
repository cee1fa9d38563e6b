"""torch.compile: one graph of the whole model or a part, and no new one when the mix of tasks changes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import CompileConfig, Trainer, TrainingArguments

from hyperadapt import use_tasks
from tests.support.example_rows import MIXED_SOURCES, with_examples
from tests.support.helpers import (
    BILINEAR,
    MIXED,
    TASKS,
    adapted_model,
    adapter_parameters,
    double,
    enable_checkpointing,
    example_batch,
    letters,
    logits,
    two_adapters,
)
from tests.support.tolerances import FLOAT64_MODEL

pytestmark = [
    # Dynamo asks every tensor for its gradient, and torch itself warns of that.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}
MIXES = [[0, 1, 2, 0], [1, 1, 2, 0], [0, 0, 1, 1], [2, 2, 2, 2], [2, 1, 0, 2]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(
    model: Callable[..., Any], backend: str = "aot_eager"
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The model as one graph (anything else raises), and what counts the compilations."""
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("an older torch breaks the graph where PEFT enters it")
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def gradients(model: nn.Module) -> dict[str, Tensor]:
    result = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    model.zero_grad()
    return result


@pytest.mark.parametrize(
    ("name", "normalization", "num_tasks"),
    [
        ("bert", "soft_frobenius", 6),
        ("llama", "soft_frobenius", 3),
        ("llama", "soft_polar", 3),
        ("llama", "spectral", 6),
        ("llama", "sinkhorn", 3),
        ("t5", "soft_frobenius", 3),
    ],
)
def test_training_is_one_graph_for_any_mix(name: str, normalization: str, num_tasks: int) -> None:
    tasks = [f"task {index}" for index in range(num_tasks)]
    own = ["task 1"] if normalization == "soft_polar" else None
    model = adapted_model(name, tasks=tasks, own_factors=own, normalization=normalization).double().train()
    graph, counter = compiled(model)
    batch = double(example_batch(name))
    for mix in MIXES:
        ids = torch.tensor(mix)
        expected = model(**batch, tasks=ids)
        expected.loss.backward()
        expected_gradients = gradients(model)
        actual = graph(**batch, tasks=ids)
        actual.loss.backward()
        assert_close(actual.logits, expected.logits, **CLOSE)
        assert_close(gradients(model), expected_gradients, **CLOSE)
    assert counter.frame_count == 1


def test_the_bound_grows_in_a_graph_as_without_one() -> None:
    losses: dict[str, list[float]] = {}
    for name in ("graph", "plain"):
        model = adapted_model("llama", active=False, normalization_warmup=3).double().train()
        batch, ids = double(example_batch("llama")), torch.tensor(MIXES[0])
        # Where rows lie is learned in a first call, outside of the graph.
        model(**batch, tasks=ids)
        called, _ = compiled(model) if name == "graph" else (model, None)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        losses[name] = []
        for _ in range(4):
            loss = called(**batch, tasks=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(float(loss.detach()))
        assert model.base_model.router.network("default").warmup.trained_steps == 4
    assert losses["graph"] == pytest.approx(losses["plain"])


@pytest.mark.parametrize(
    "settings", [pytest.param({"text_encoder": letters}, id="gated"), pytest.param(BILINEAR, id="bilinear")]
)
def test_descriptions_are_part_of_the_graph(settings: dict[str, Any]) -> None:
    sources = {"alpha": "text", "beta": "both", "gamma": "learned"}
    descriptions = {"alpha": ["one", "two"], "beta": "three", "gamma": "four"}
    model = adapted_model("llama", tasks=descriptions, task_embedding=sources, **settings).double()
    graph, counter = compiled(model)
    batch = double(example_batch("llama"))
    for mix in MIXES:
        expected, actual = (module(**batch, tasks=torch.tensor(mix) % 3) for module in (model, graph))
        assert_close(actual.logits, expected.logits, **CLOSE)
    assert counter.frame_count == 1
    # In training the graph draws descriptions.
    graph.train()
    graph(**batch, tasks=torch.tensor([0, 1, 2, 1])).loss.backward()
    assert all(value.isfinite().all() for value in gradients(model).values())


def test_examples_are_part_of_the_graph() -> None:
    model = with_examples("llama", MIXED_SOURCES).double()
    graph, counter = compiled(model)
    batch = double(example_batch("llama"))
    for mix in MIXES:
        expected, actual = (module(**batch, tasks=torch.tensor(mix) % 3) for module in (model, graph))
        assert_close(actual.logits, expected.logits, **CLOSE)
    assert counter.frame_count == 1
    # In training the graph draws rows.
    graph.train()
    graph(**batch, tasks=torch.tensor([0, 1, 2, 1])).loss.backward()
    assert all(value.isfinite().all() for value in gradients(model).values())


@pytest.mark.parametrize("task_type", [pytest.param(None, marks=pytest.mark.slow), "CAUSAL_LM"])
def test_every_way_to_name_tasks(task_type: str | None) -> None:
    model = adapted_model("llama", task_type=task_type).double()
    batch = example_batch("llama", labels=False)
    graph, _ = compiled(model)
    embeddings = model.base_model.router.network("default").task_embedding.weight.detach()
    mixed = torch.tensor([TASKS.index(task) for task in MIXED])
    with torch.no_grad():
        expected, alone = logits(model, batch, tasks=MIXED), logits(model, batch, tasks="beta")
        assert (expected - alone).abs().max() > 0.1
        assert_close(logits(graph, batch, tasks=MIXED), expected, **CLOSE)
        assert_close(logits(graph, batch, tasks=mixed), expected, **CLOSE)
        assert_close(logits(graph, batch, task_embeddings=embeddings[mixed]), expected, **CLOSE)
        with use_tasks(model, mixed):
            assert_close(logits(graph, batch), expected, **CLOSE)
        assert_close(logits(graph, batch, tasks="beta"), alone, **CLOSE)
        model.set_task("beta")
        assert_close(logits(graph, batch), alone, **CLOSE)
        model.merge_adapter()
        assert_close(logits(graph, batch), alone, **CLOSE)


def test_a_pinned_task_follows_the_parameters() -> None:
    model = adapted_model("llama").double()
    model.set_task("beta")
    graph, counter = compiled(model)
    batch = example_batch("llama", labels=False)
    with torch.no_grad():
        before = logits(graph, batch)
        for parameter in adapter_parameters(model).values():
            parameter.data.mul_(1.5)
        after = logits(graph, batch)
        model.set_task("beta")
        assert_close(after, logits(model, batch), **CLOSE)
    assert (after - before).abs().max() > 0.01
    assert counter.frame_count == 1


def requests(model: nn.Module) -> list[list[dict[str, Any]]]:
    """Of one task, of rows that share tasks and of rows with a task each, by the ways to ask for them."""
    embeddings = model.base_model.router.network("default").task_embedding.weight.detach()
    one, shared, distinct = torch.tensor([1, 1, 1, 1]), torch.tensor([2, 0, 0, 2]), torch.tensor([2, 0, 1, 3])
    return [
        [
            {"tasks": "alpha"},
            {"pin": "beta"},
            {"tasks": ["gamma"] * 4},
            {"tasks": one},
            {"task_embeddings": embeddings[3]},
        ],
        [{"tasks": ["beta", "alpha", "alpha", "beta"]}, {"tasks": MIXED}, {"tasks": shared}],
        [{"tasks": distinct}, {"tasks": ["alpha", "delta", "beta", "gamma"]}, {"task_embeddings": embeddings[shared]}],
    ]


def test_a_graph_of_the_base_model_serves_all_requests_of_a_kind() -> None:
    model = adapted_model("llama", tasks=[*TASKS, "delta"]).double()
    base, batch, made = model.get_base_model(), example_batch("llama", labels=False), []
    eager = base.forward
    graph, counter = compiled(eager, "eager")
    for kind in requests(model):
        for request in kind:
            model.set_task(request.pop("pin", None))
            base.forward = eager
            expected = logits(model, batch, **request)
            base.forward = graph
            assert_close(logits(model, batch, **request), expected, **CLOSE)
        made.append(counter.frame_count)
    # One task is no number that could vary; from then on the number of tasks is.
    assert made == [1, 2, 3]


def test_decoding_that_transformers_compiles_breaks_no_graph() -> None:
    model = adapted_model("llama", tasks=[*TASKS, "delta"])
    _, counter = compiled(model, "eager")
    # The counter itself would be copied.
    compiling = CompileConfig(backend=lambda *args: counter(*args), mode=None, fullgraph=True)
    # Otherwise only on accelerators.
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = example_batch("llama", labels=False)
    for kind in requests(model):
        for request in kind:
            model.set_task(request.pop("pin", None))
            expected = model.generate(**batch, **request, **options)
            static = {"cache_implementation": "static", "compile_config": compiling}
            assert torch.equal(model.generate(**batch, **request, **options, **static), expected)
    assert counter.frame_count == 3


def test_threads_share_a_graph_of_the_base_model() -> None:
    model = adapted_model("llama").double()
    base, batch = model.get_base_model(), example_batch("llama", labels=False)
    expected = {task: logits(model, batch, tasks=task) for task in TASKS}
    base.forward, counter = compiled(base.forward)
    logits(model, batch, tasks="alpha")

    def answers(task: str) -> bool:
        return all(torch.allclose(logits(model, batch, tasks=task), expected[task], **CLOSE) for _ in range(5))

    with ThreadPoolExecutor(len(TASKS)) as threads:
        assert all(threads.map(answers, TASKS))
    assert counter.frame_count == 1


def test_training_with_a_graph_of_the_base_model() -> None:
    model = adapted_model("llama").double().train()
    batch, base = double(example_batch("llama")), model.get_base_model()
    eager = base.forward
    graph, counter = compiled(eager)
    for mix in ([0, 1, 1, 0], [2, 1, 2, 2]):
        outputs, grads = [], []
        for base.forward in (eager, graph):
            outputs.append(model(**batch, tasks=torch.tensor(mix)))
            outputs[-1].loss.backward()
            grads.append(gradients(model))
        assert_close(outputs[1].logits, outputs[0].logits, **CLOSE)
        assert_close(grads[1], grads[0], **CLOSE)
    assert counter.frame_count == 1


def test_two_adapters_at_once() -> None:
    model = two_adapters().double()
    model.base_model.set_adapter(["default", "second"])
    batch, ids = example_batch("llama", labels=False), torch.tensor([0, 1, 1, 0])
    graph, _ = compiled(model)
    with torch.no_grad():
        expected = logits(model, batch, tasks=ids)
        assert_close(logits(graph, batch, tasks=ids), expected, **CLOSE)


def test_wrong_numbers_of_rows_and_ids_are_refused() -> None:
    model = adapted_model("llama")
    graph, _ = compiled(model)
    batch = example_batch("llama", labels=False)
    with torch.no_grad():
        with pytest.raises(Exception, match="Got tasks for 2 rows, but the batch has 4"):
            graph(**batch, tasks=torch.tensor([0, 1]))
        # A graph cannot learn where rows lie.
        with pytest.raises(Exception, match="Call the model once with a task per row before"):
            graph(**batch, tasks=torch.tensor([0, 1, 2, 2]))
        model(**batch, tasks=MIXED)
        for wrong in (9, -1):
            with pytest.raises(IndexError, match="out of bounds"):
                graph(**batch, tasks=torch.tensor([0, 1, 2, wrong]))


def test_gradient_checkpointing() -> None:
    model = adapted_model("llama").double().train()
    batch, ids = double(example_batch("llama")), torch.tensor(MIXES[0])
    model(**batch, tasks=ids).loss.backward()
    expected = gradients(model)
    enable_checkpointing(model, use_reentrant=False)
    # Not one graph: the model's own checkpointing makes some of its own.
    torch.compile(model, backend="aot_eager")(**batch, tasks=ids).loss.backward()
    assert_close(gradients(model), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_trainer_with_inductor(tmp_path: Path) -> None:
    def train(folder: str, **options: Any) -> Tensor:
        model = adapted_model("llama", active=False)
        batch = example_batch("llama", rows=8)
        rows = [{key: value[row] for key, value in batch.items()} | {"tasks": row % 3} for row in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        return torch.tensor(Trainer(model, arguments, train_dataset=rows).train().training_loss)

    assert_close(train("compiled", torch_compile=True), train("eager"), rtol=1e-4, atol=0)
