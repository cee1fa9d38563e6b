"""The lm-evaluation-harness asks for tasks: each request is answered by its own, whatever the order."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import hyperadapt
from hyperadapt.runs import Run, load_run
from tests.support import lm_eval_standin
from tests.support.helpers import ROOT
from tests.support.tiny_runs import recipe, silent, training
from tests.support.tolerances import FLOAT32_FORWARD

MODULE = "hyperadapt.runs.harness"
TASKS = ["reviews", "letters", "mail"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    return silent(recipe(folder, "CAUSAL_LM", **training(max_steps=30, learning_rate=1e-2, eval_strategy="no")))


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return load_run(trained)


@pytest.fixture(params=["stand-in", pytest.param("lm_eval", marks=pytest.mark.slow)])
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What is tested, on the stand-in or on what is installed."""
    if request.param == "lm_eval":
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        yield _real()
        return
    lm_eval_standin.install(monkeypatch)
    yield _imported_anew()
    sys.modules.pop(MODULE)


@functools.cache
def _real() -> ModuleType:
    """On what is installed, which registers a name once."""
    return _imported_anew()


def _imported_anew() -> ModuleType:
    sys.modules.pop(MODULE, None)
    return importlib.import_module(MODULE)


def requests(kind: str, named: tuple[str, ...] = ("reviews", "letters", "mail", "reviews")) -> list[Any]:
    """The same prompts for several tasks, mixed."""
    arguments = {
        "loglikelihood": [("good a b", " yes"), ("good a b", " no no")],
        "loglikelihood_rolling": [("good a b",), ("spam c",)],
        "generate_until": [(text, {"until": ["</s>"], "max_gen_toks": 4}) for text in ("good a b", "spam c")],
    }[kind]
    made = importlib.import_module("lm_eval.api.instance").Instance
    return [
        made(kind, {}, one, index, metadata=(name, index, 1)) for one in arguments for index, name in enumerate(named)
    ]


@torch.no_grad()
def expected(run: Run, request: Any, task: str) -> Any:
    """What the model itself answers for a task."""
    if request.request_type == "generate_until":
        ids = run.tokenizer(request.args[0], return_tensors="pt").input_ids
        output = run.model.generate(input_ids=ids, tasks=task, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return run.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    ids = torch.tensor(run.tokenizer("".join(request.args)).input_ids)
    start = len(run.tokenizer(request.args[0]).input_ids)
    if request.request_type == "loglikelihood_rolling":
        ids, start = torch.cat([torch.tensor([run.tokenizer.bos_token_id]), ids]), 1
    log_probs = run.model(ids[None, :-1], tasks=task).logits[0].log_softmax(-1)[start - 1 :]
    total = pytest.approx(float(log_probs.gather(1, ids[start:, None]).sum()), rel=FLOAT32_FORWARD)
    if request.request_type == "loglikelihood_rolling":
        return total
    return total, bool((log_probs.argmax(1) == ids[start:]).all())


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_each_request_is_answered_by_its_task(harness: ModuleType, run: Run, kind: str) -> None:
    model = harness.HyperAdapterLM(run.model, {"le*": "mail"}, tokenizer=run.tokenizer, batch_size=2)
    given = requests(kind)
    answers = getattr(model, kind)(given)
    wanted = [expected(run, one, "mail" if one.task_name == "letters" else one.task_name) for one in given]
    assert answers == wanted
    # The tasks do differ.
    assert any(str(expected(run, one, "mail")) != str(expected(run, one, "reviews")) for one in given)
    assert run.model.base_model.router.pinned_task("default") is None


def test_one_task_for_all_and_the_pin_comes_back(harness: ModuleType, run: Run) -> None:
    model = harness.HyperAdapterLM(run.model, "mail", tokenizer=run.tokenizer)
    given = requests("loglikelihood", ("arc", "boolq"))
    run.model.set_task("letters")
    try:
        assert model.loglikelihood(given) == [expected(run, one, "mail") for one in given]
        assert run.model.active_task == "letters"
    finally:
        run.model.set_task(None)


def test_a_name_counts_before_patterns(harness: ModuleType, run: Run) -> None:
    answered_by = {"arc_*": "reviews", "arc_easy": "mail", "x[1]": "mail"}
    model = harness.HyperAdapterLM(run.model, answered_by, tokenizer=run.tokenizer)
    given = requests("loglikelihood", ("arc_easy", "x[1]", "arc_hard"))
    wanted = ["mail", "mail", "reviews"] * 2
    assert model.loglikelihood(given) == [expected(run, *pair) for pair in zip(given, wanted, strict=True)]


@pytest.mark.parametrize("device", ["cpu", "cuda:0", None])
def test_an_adapter_is_loaded_by_its_folder(
    harness: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    # The harness's command asks for "cuda:0" where there is none.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    model = harness.HyperAdapterLM(str(run.folder), device=device)
    assert model.tokenizer.get_vocab() == run.tokenizer.get_vocab()
    given = requests("loglikelihood", ("mail",))
    assert model.loglikelihood(given) == [expected(run, one, "mail") for one in given]


def test_what_is_wrong_is_refused(harness: ModuleType, run: Run, tmp_path: Path) -> None:
    made = harness.HyperAdapterLM
    with pytest.raises(ValueError, match=re.escape("tasks='post' names ['post'], which are no tasks of the adapter.")):
        made(run.model, "post", tokenizer=run.tokenizer)
    with pytest.raises(ValueError, match=re.escape("tasks={'arc': 'post'} names ['post'], which are no tasks")):
        made(run.model, {"arc": "post"}, tokenizer=run.tokenizer)
    with pytest.raises(TypeError, match=re.escape("tasks=['mail'] must be a dict, or one name, not list.")):
        made(run.model, ["mail"], tokenizer=run.tokenizer)
    model = made(run.model, tokenizer=run.tokenizer)
    message = (
        "The harness asks for 'mails', which is no task of the adapter and not in tasks=. Did you mean 'mail'? Name "
        "the adapter's task that answers it, tasks={'mails': ...}, one of ['reviews', 'letters', 'mail']."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.loglikelihood(requests("loglikelihood", ("mail", "mails")))
    with pytest.raises(ValueError, match=r"use_cache keeps answers by their prompts alone, so that tasks of the"):
        model.set_cache_hook(None)
    message = "The harness was called inside of use_tasks, whose task would answer all of its tasks. Call it outside."
    with hyperadapt.use_tasks(run.model, "mail"), pytest.raises(ValueError, match=re.escape(message)):
        model.generate_until(requests("generate_until"))
    classifier = silent(recipe(tmp_path, **training(max_steps=1, eval_strategy="no")))
    with pytest.raises(ValueError, match=r"the adapter is a classifier \(task_type='SEQ_CLS'\). Measure it with"):
        made(str(classifier))


def test_without_the_harness_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ImportError, match=r"needs the lm-evaluation-harness, .* Install it: pip install lm_eval\."):
        _imported_anew()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_run_for_all_tasks_is_what_their_exports_get(run: Run, tmp_path: Path) -> None:
    """The real harness: on the live model, on each task's export, and by its command."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = _real()
    for name, choices in zip(TASKS, [["yes", "no"]] * 2 + [["spam", "ham"]], strict=True):
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(run.folder.parent / "data" / name / "test.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": choices,
            "doc_to_target": "{{completion}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        hyperadapt.export_lora(run.model, name, tmp_path / "loras" / name)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def results(model: Any, tasks: list[str]) -> dict[str, Any]:
        found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        scores = {name: found["results"][name]["acc,none"] for name in tasks}
        return {name: (scores[name], [row["resps"] for row in found["samples"][name]]) for name in tasks}

    live = results(harness.HyperAdapterLM(run.model, tokenizer=run.tokenizer, batch_size=4), TASKS)
    for name in TASKS:
        options = {"pretrained": run.recipe.base_model, "peft": str(tmp_path / "loras" / name), "device": "cpu"}
        [(score, answers)] = results(HFLM(**options, batch_size=4), [name]).values()
        assert score == live[name][0]
        for got, wanted in zip(answers, live[name][1], strict=True):
            assert [one[0][0] for one in got] == pytest.approx([one[0][0] for one in wanted], rel=1e-4)
    command = [sys.executable, "-m", MODULE, "run", "--model", "hyperadapt", "--model_args", f"pretrained={run.folder}"]
    command += ["--tasks", *TASKS, "--include_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^\|(\w+) *\|.*\|acc *\|. *\| *([\d.]+) *\|", done.stdout, re.MULTILINE))
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(
        {name: live[name][0] for name in TASKS}, abs=1e-4
    )
