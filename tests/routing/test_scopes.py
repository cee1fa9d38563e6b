"""``use_tasks`` holds for the thread and the asyncio task that is inside of it, and for no other."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Pipeline, Trainer, TrainingArguments

from hyperadapt import use_tasks
from hyperadapt.routing import scopes
from tests.support.helpers import (
    MIXED,
    TASKS,
    adapted_model,
    adapter_config,
    example_batch,
    logits,
    make_active,
    minilm,
)

BATCH = example_batch("llama", labels=False)


@pytest.fixture
def model() -> PeftModel:
    return adapted_model("llama")


@pytest.fixture
def truth(model: PeftModel) -> dict[str, Tensor]:
    return {task: logits(model, BATCH, tasks=task) for task in TASKS}


def test_threads(model: PeftModel, truth: dict[str, Tensor]) -> None:
    meet = threading.Barrier(3)

    def serve(task: str) -> bool:
        with use_tasks(model, task):
            meet.wait()
            found = logits(model, BATCH)
            meet.wait()
        return torch.equal(found, truth[task])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(serve, TASKS))
    assert not any(scopes._open.values())


def test_asyncio(model: PeftModel, truth: dict[str, Tensor]) -> None:
    async def serve(task: str, delays: tuple[float, float]) -> bool:
        await asyncio.sleep(delays[0])
        with use_tasks(model, task):
            await asyncio.sleep(delays[1])
            return torch.equal(logits(model, BATCH), truth[task])

    async def serve_all() -> list[bool]:
        # The first opens first and closes last, the second closes before the third opens.
        return await asyncio.gather(*map(serve, TASKS, [(0, 0.06), (0.01, 0.01), (0.03, 0.01)]))

    assert asyncio.run(serve_all()) == [True] * 3
    assert not any(scopes._open.values())


def test_nested(model: PeftModel, truth: dict[str, Tensor]) -> None:
    with use_tasks(model, "alpha"):
        with use_tasks(model, "beta"):
            assert torch.equal(logits(model, BATCH), truth["beta"])
            assert torch.equal(logits(model, BATCH, tasks="gamma"), truth["gamma"])
        assert torch.equal(logits(model, BATCH), truth["alpha"])
    assert model.base_model.router.asked is None


def test_a_thread_started_inside_is_told(model: PeftModel, truth: dict[str, Tensor]) -> None:
    """It sees nothing of it, so that it would use the default task without a word."""

    def run(**routing: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(logits, model, BATCH, **routing).result()

    with use_tasks(model, "beta"):
        with pytest.raises(ValueError, match=r"another thread is inside of use_tasks.*pass tasks="):
            run()
        assert torch.equal(run(tasks="gamma"), truth["gamma"])
        model.set_task("alpha")
        assert torch.equal(run(), truth["alpha"])
        assert torch.equal(logits(model, BATCH), truth["beta"])


def test_adapters_of_one_task_need_none() -> None:
    model = adapted_model("llama", tasks=["only"])
    with use_tasks(model, "only"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, BATCH).result(), logits(model, BATCH))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_graphs(model: PeftModel, truth: dict[str, Tensor], fullgraph: bool) -> None:
    """They see the thread's scope; of several asyncio tasks they refuse to take one for another."""
    if fullgraph and Version(torch.__version__) < Version("2.13"):
        pytest.skip("an older torch breaks the graph where PEFT enters it")
    torch.compiler.reset()
    graph = torch.compile(model, backend="eager", fullgraph=fullgraph)
    for task in TASKS:
        with use_tasks(model, task):
            assert torch.allclose(logits(graph, BATCH), truth[task], atol=1e-4)

    async def serve(task: str, wait: float) -> Tensor:
        with use_tasks(model, task):
            await asyncio.sleep(wait)
            return logits(graph, BATCH)

    async def both() -> list[Any]:
        return await asyncio.gather(serve("alpha", 0.01), serve("beta", 0.1), return_exceptions=True)

    first, second = asyncio.run(both())
    if fullgraph:
        assert "a compiled model cannot tell" in str(first)
    else:
        # What is not compiled can tell.
        assert torch.allclose(first, truth["alpha"], atol=1e-4)
    assert torch.allclose(second, truth["beta"], atol=1e-4)
    torch.compiler.reset()


def test_rows_with_a_task_each(model: PeftModel) -> None:
    expected = logits(model, BATCH, tasks=MIXED)
    with use_tasks(model, MIXED):
        assert torch.equal(logits(model, BATCH), expected)


REFUSED = r"a task for each of 4 rows, but {} of {}.* sorts or splits the rows.*with one name in use_tasks"


def test_code_that_rearranges_rows_is_refused(tmp_path: Path) -> None:
    """Sentence Transformers sorts texts by length, pipelines take a few at a time, and Trainer does both."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    part = encoder[0]
    # Called "auto_model" before its version 6.
    name = "model" if "model" in dict(part.named_children()) else "auto_model"
    plain = getattr(part, name)
    model = make_active(get_peft_model(plain, adapter_config(target_modules=["query", "value"])))
    setattr(part, name, model)
    texts = ["a much longer text than all of the others here", "short", "a text of some length", "two words"]
    with use_tasks(model, MIXED), pytest.raises(ValueError, match=REFUSED.format("encode", "sentence_transformers")):
        encoder.encode(texts)
    # One task for all is right, and rows that the caller tokenises keep their order.
    with use_tasks(model, "beta"):
        together = encoder.encode(texts)
        for text, row in zip(texts, together, strict=True):
            assert np.allclose(encoder.encode(text), row, atol=1e-4)
    with use_tasks(model, MIXED), torch.no_grad():
        mixed = encoder.forward(encoder.tokenize(texts))["sentence_embedding"]
    for text, task, row in zip(texts, MIXED, mixed, strict=True):
        with use_tasks(model, task):
            assert np.allclose(encoder.encode(text, normalize_embeddings=False), row, atol=1e-4)


def test_trainer_and_pipelines_are_refused(model: PeftModel, tmp_path: Path) -> None:
    rows = [{key: value[row % 4] for key, value in example_batch("llama").items()} for row in range(8)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    with use_tasks(model, MIXED):
        with pytest.raises(ValueError, match=REFUSED.format("evaluation_loop", "transformers.trainer")):
            trainer.evaluate()
        with pytest.raises(ValueError, match=REFUSED.format("__call__", "transformers.pipelines")):
            Plain(model=model, device="cpu")(rows[0])


class Plain(Pipeline):
    """Feeds rows to the model as they are."""

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        return {}, {}, {}

    def preprocess(self, row: Any) -> Any:
        return {key: value[None] for key, value in row.items()}

    def _forward(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def postprocess(self, outputs: Any) -> Any:
        return outputs.logits
