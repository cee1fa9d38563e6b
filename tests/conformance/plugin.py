"""pytest plugin that puts hyperadapters into PEFT's parametrisation lists and counts the outcomes."""

import contextlib
import importlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hyperadapt import HyperAdapterConfig
from tests.conformance.cases import DESELECTED, LISTS, UNNAMED
from tests.conformance.models import cat_image, english_quotes

OTHERS = "not about a method under test"


class Outcomes:
    """Outcomes by file, deselections and skips by reason, and the lists that were found."""

    def __init__(self) -> None:
        self.files: dict[str, Counter[str]] = {}
        self.deselected: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.failures: list[str] = []
        self.replaced: dict[str, int] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Count a report."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        elif report.skipped:
            self.skips[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
        elif report.failed:
            self.failures.append(report.nodeid)
        self.files.setdefault(report.nodeid.partition("::")[0], Counter())[outcome] += 1


outcomes = Outcomes()


def pytest_configure() -> None:
    """Put stand-ins for what needs the network before the tests import it."""
    pytest.register_assert_rewrite("peft_tests.testing_common")
    utilities = importlib.import_module("peft_tests.testing_utils")
    # The models are always at hand, and this would go online for each of them once.
    utilities.hub_online_once = contextlib.nullcontext
    utilities.load_cat_image = cat_image
    utilities.load_dataset_english_quotes = english_quotes
    # It skips all but four of PEFT's methods, and Conv1D is among what hyperadapters adapt.
    common = importlib.import_module("peft_tests.testing_common")
    common._skip_if_conv1d_not_supported = lambda *_: None
    check = common.PeftCommonTester.check_modelcard

    def check_modelcard(self: Any, folder: str, model: Any) -> None:
        # Cards name the library that an adapter needs; all else is as PEFT checks it.
        card = Path(folder, "README.md").read_text(encoding="utf-8")
        assert "\nlibrary_name: hyperadapt\n" in card
        with tempfile.TemporaryDirectory() as copy:
            changed = card.replace("\nlibrary_name: hyperadapt\n", "\nlibrary_name: peft\n", 1)
            Path(copy, "README.md").write_text(changed, encoding="utf-8")
            check(self, copy, model)

    common.PeftCommonTester.check_modelcard = check_modelcard


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the lists in a test's parametrisation."""
    module = metafunc.module.__name__.rpartition(".")[2]
    test = metafunc.function.__name__
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name != "parametrize":
            continue
        names, values = marker.args
        cases = UNNAMED.get(module, {}).get(test, {}).get(names)
        found = f"{module}.{test}({names})"
        for name, named_cases in LISTS.get(module, {}).items():
            if values is getattr(metafunc.module, name):
                cases, found = named_cases, f"{module}.{name}"
        if cases is None:
            continue
        outcomes.replaced[found] = len(cases)
        # Ids in a list belong to the cases that were replaced.
        keywords = {key: value for key, value in marker.kwargs.items() if key != "ids" or callable(value)}
        markers[index] = pytest.mark.parametrize(names, cases, **keywords).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that were given a hyperadapter."""
    kept, dropped = [], []
    for item in items:
        reason = next((reason for reason, ids in DESELECTED.items() if any(part in item.nodeid for part in ids)), None)
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if not any(_is_hyperadapter(value) for value in parameters.values()):
            reason = OTHERS
        if reason is None:
            kept.append(item)
        else:
            outcomes.deselected[reason] += 1
            dropped.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _is_hyperadapter(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_hyperadapter, value))
    return value is HyperAdapterConfig or isinstance(value, HyperAdapterConfig)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count."""
    outcomes.add(report)


def pytest_sessionfinish() -> None:
    """Leave the counts where the command finds them."""
    # Workers of pytest-xdist collect but the controller reports.
    name = os.environ.get("PYTEST_XDIST_WORKER", "controller")
    path = Path(os.environ["CONFORMANCE_OUTCOMES"], f"{name}.json")
    path.write_text(json.dumps(vars(outcomes)))
