"""What lm_eval 0.4.13 offers to a model, and what it asks of one, for where it is not installed.

`python -m tests.lm_eval_interface` compares the signatures here with those of a release.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jinja2 import Template
from torch import Tensor


@dataclass
class Instance:
    """Of lm_eval/api/instance.py."""

    request_type: str
    doc: dict[str, Any]
    arguments: tuple[Any, ...]
    idx: int
    metadata: tuple[str | None, int | None, int | None] = field(default_factory=lambda: (None, None, None))
    resps: list[Any] = field(default_factory=list)
    filtered_resps: dict[str, Any] = field(default_factory=dict)
    task_name: str | None = None
    doc_id: int | None = None
    repeats: int | None = None

    def __post_init__(self) -> None:
        self.task_name, self.doc_id, self.repeats = self.metadata

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


def register_model(*names: str) -> Callable[[type], type]:
    """Of lm_eval/api/registry.py."""

    def decorator(model: type) -> type:
        sys.modules["lm_eval.api.registry"].MODELS.update(dict.fromkeys(names, model))
        return model

    return decorator


class HFLM:
    """Of lm_eval/models/huggingface.py, where rows are sorted and padded to batches."""

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int = 1, **kwargs: Any) -> None:
        assert not isinstance(pretrained, str)
        assert not kwargs
        self._model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        self._model.eval()
        self._model.tie_weights()
        self.cache_hook: Any = None

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.cache_hook = cache_hook

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = []
        for request in requests:
            context, continuation = request.args
            length = len(self.tokenizer(context).input_ids)
            ids = torch.tensor(self.tokenizer(context + continuation).input_ids)
            log_probs = self._log_probs(ids[:-1])[length - 1 :]
            scores = log_probs.gather(1, ids[length:, None])
            answers.append((float(scores.sum()), bool((log_probs.argmax(1) == ids[length:]).all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        answers = []
        for request in requests:
            ids = torch.tensor(self.tokenizer(request.args[0]).input_ids)
            first = torch.tensor([self.tokenizer.bos_token_id])
            log_probs = self._log_probs(torch.cat([first, ids[:-1]]))
            answers.append(float(log_probs.gather(1, ids[:, None]).sum()))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in requests:
            context, options = request.args
            ids = self.tokenizer(context, return_tensors="pt").input_ids
            length = ids.shape[1] + options["max_gen_toks"]
            output = self._model.generate(input_ids=ids, max_length=length, do_sample=False, pad_token_id=0)
            answers.append(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        return answers

    @torch.no_grad()
    def _log_probs(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(ids[None]).logits[0]
        return logits.log_softmax(-1)


class TaskManager:
    """Of lm_eval/tasks/manager.py: finds tasks in a folder."""

    def __init__(self, include_path: str) -> None:
        self.tasks = {}
        for path in Path(include_path).glob("*.yaml"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            self.tasks[content["task"]] = content


def simple_evaluate(model: Any, tasks: list[str], task_manager: TaskManager) -> dict[str, Any]:
    """Of lm_eval/evaluator.py, for multiple choices from JSON lines: all requests go to the model at once."""
    requests, wanted = [], []
    for name in tasks:
        task = task_manager.tasks[name]
        assert (task["output_type"], task["dataset_path"]) == ("multiple_choice", "json")
        path = task["dataset_kwargs"]["data_files"][task["test_split"]]
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            prompt, target = (Template(task[key]).render(row) for key in ("doc_to_text", "doc_to_target"))
            wanted.append((name, task["doc_to_choice"].index(target)))
            pairs = [(prompt, f" {choice}") for choice in task["doc_to_choice"]]
            requests += [Instance("loglikelihood", row, pair, at, (name, number, 1)) for at, pair in enumerate(pairs)]
    answers = iter(model.loglikelihood(requests))
    right: dict[str, list[bool]] = {name: [] for name in tasks}
    for name, target in wanted:
        scores = [next(answers)[0] for _ in task_manager.tasks[name]["doc_to_choice"]]
        right[name].append(max(range(len(scores)), key=scores.__getitem__) == target)
    return {"results": {name: {"acc,none": sum(hits) / len(hits)} for name, hits in right.items()}}


def cli_evaluate() -> None:
    """Of lm_eval/__main__.py."""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``lm_eval`` and the modules that a model imports importable."""
    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.__main__": {"cli_evaluate": cli_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": Instance},
        "lm_eval.api.registry": {"register_model": register_model, "MODELS": {}},
        "lm_eval.models": {},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
