"""EleutherAI's lm-evaluation-harness on many tasks in one run. Importing this imports the harness, ``lm_eval``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from hyperadapt.config.checks import check_type, shown, suggestion
from hyperadapt.recipes.base_models import SAFELY
from hyperadapt.runs.folder import find_folder
from hyperadapt.runs.run import load_model
from hyperadapt.tuner.active import find_tuner

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"hyperadapt.runs.harness needs the lm-evaluation-harness, which could not be imported ({error}). Install it: "
        "pip install lm_eval."
    ) from error

__all__ = ["HyperAdapterLM"]


@register_model("hyperadapt")
class HyperAdapterLM(HFLM):
    """A language model with a hyperadapter, in which each of the harness's tasks is answered by one of the adapter's.

    The harness knows it as ``hyperadapt``. Requests go to the model task by task, so that the factors of each are
    generated once.

    Args:
        pretrained: The model; or the adapter's folder, or its name on the Hub.
        tasks: Name of a task of the harness, or a pattern such as ``"mmlu_*"`` -> name of the adapter's task that
            answers it; or one name for all of them. A name counts before patterns, and the first pattern that fits
            before others. A task that is not in it is answered by the adapter's of its name.
        tokenizer: As in ``HFLM``; None takes the adapter's, or else the base model's.
        revision: Of an adapter on the Hub.
        device: Where to move the model; None, or an accelerator that is not there, leaves it where it is.
        **options: Further arguments of ``HFLM``, such as `batch_size`.

    Raises:
        TypeError: If the model has no hyperadapter, or `tasks` is of another type.
        ValueError: If the adapter is a classifier, or has no such task.
    """

    def __init__(  # noqa: DOC503
        self,
        pretrained: PeftModel | str | os.PathLike[str],
        tasks: Mapping[str, str] | str | None = None,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        model: Any = pretrained
        if isinstance(pretrained, str | os.PathLike):
            folder = find_folder(pretrained, revision, None)
            model = load_model(folder)
            if tokenizer is None and (folder / "tokenizer_config.json").exists():
                tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
        self._tuner = find_tuner(model)
        [adapter, *_] = self._tuner.active_adapters
        if model.peft_config[adapter].task_type == "SEQ_CLS":
            raise ValueError(
                "The harness compares and generates text, but the adapter is a classifier (task_type='SEQ_CLS'). "
                "Measure it with `hyperadapt evaluate`, or evaluate() of hyperadapt.runs."
            )
        self._answered_by = _checked_tasks(tasks, self._tuner.tasks)
        super().__init__(_moved(model, device), tokenizer=tokenizer, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in ``HFLM``, each request for its task."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in ``HFLM``, each request for its task."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in ``HFLM``, each request for its task."""
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse the harness's cache of answers.

        Args:
            cache_hook: The cache.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "use_cache keeps answers by their prompts alone, so that tasks of the adapter with the same prompt would "
            "get each other's. Leave use_cache out."
        )

    def _by_task(self, call: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        """What a call answers to requests, in their order, with those for one task at a time."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[self._task_of(request)].append(place)
        answers: dict[int, Any] = {}
        with self._pins_restored():
            for task, own in places.items():
                self._tuner.set_task(task)
                given = call([requests[place] for place in own], disable_tqdm=disable_tqdm)
                answers |= zip(own, given, strict=True)
        return [answers[place] for place in range(len(requests))]

    @contextmanager
    def _pins_restored(self) -> Iterator[None]:
        router = self._tuner.router
        if router.asked is not None:
            raise ValueError(
                "The harness was called inside of use_tasks, whose task would answer all of its tasks. Call it outside."
            )
        before = router.pinned_task(self._tuner.active_adapters[0])
        try:
            yield
        finally:
            self._tuner.set_task(before)

    def _task_of(self, request: Any) -> str:
        name, known = request.task_name, self._tuner.tasks
        if name in self._answered_by:
            return self._answered_by[name]
        for pattern, task in self._answered_by.items():
            if fnmatchcase(name, pattern):
                return task
        if name not in known:
            raise ValueError(
                f"The harness asks for {name!r}, which is no task of the adapter and not in tasks=."
                f"{suggestion(name, known, {})} Name the adapter's task that answers it, tasks={{{name!r}: ...}}, one "
                f"of {shown(known)}."
            )
        return str(name)


def _moved(model: Any, device: Any) -> Any:
    # Unless told otherwise, the harness's command asks for "cuda:0" on any machine.
    there = torch.accelerator.current_accelerator(check_available=True)
    if device is None or torch.device(device).type not in ("cpu", there and there.type):
        return model
    return model.to(device)


def _checked_tasks(tasks: object, known: list[str]) -> Mapping[str, str]:
    """Pattern of the harness's names -> the adapter's task."""
    given = {"*": tasks} if isinstance(tasks, str) else {} if tasks is None else tasks
    check_type("tasks", given, Mapping, "a dict, or one name", optional=False)
    assert isinstance(given, Mapping)
    unknown = [task for task in given.values() if task not in known]
    if unknown:
        raise ValueError(
            f"tasks={shown(tasks)} names {shown(unknown)}, which are no tasks of the adapter. Its tasks: "
            f"{shown(known)}."
        )
    return given


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
