"""pytest plugin that puts hyperadapters into PEFT's parametrisation lists and counts the outcomes."""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyperadapt import HyperAdapterConfig
from tests.conformance.cases import DESELECTED, REPLACEMENTS

# The stand-ins are always at hand, and Conv1D is among what hyperadapters adapt.
SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "hub_online_once": contextlib.nullcontext,
    "_skip_if_not_conv1d_supported": lambda *_: None,
    "_skip_if_conv1d_not_supported": lambda *_: None,
}
OTHERS = "not about a method under test"


class Outcomes:
    """Outcomes by file, deselections and skips by reason."""

    def __init__(self) -> None:
        self.files: dict[str, Counter[str]] = {}
        self.deselected: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.failures: list[str] = []

    def add(self, report: pytest.TestReport) -> None:
        """Count a report."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        elif report.skipped:
            self.skips[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
        elif report.failed:
            self.failures.append(report.nodeid)
        self.files.setdefault(report.nodeid.partition("::")[0], Counter())[outcome] += 1


outcomes = Outcomes()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the lists in a test's parametrisation."""
    module, markers = metafunc.module, metafunc.definition.own_markers
    lists = REPLACEMENTS[module.__name__.rpartition(".")[2]]
    for index, marker in enumerate(markers):
        for name, cases in lists.items():
            if marker.name == "parametrize" and marker.args[1] is getattr(module, name):
                markers[index] = pytest.mark.parametrize(marker.args[0], cases, **marker.kwargs).mark
    for owner in (module, sys.modules["peft_tests.testing_common"]):
        for name, substitute in SUBSTITUTES.items():
            if hasattr(owner, name):
                setattr(owner, name, substitute)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that were given a hyperadapter."""
    kept, dropped = [], []
    for item in items:
        reason = next((reason for part, reason in DESELECTED.items() if part in item.nodeid), None)
        if not _has_hyperadapter(item):
            reason = OTHERS
        if reason is None:
            kept.append(item)
        else:
            outcomes.deselected[reason] += 1
            dropped.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _has_hyperadapter(item: pytest.Item) -> bool:
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return any(value is HyperAdapterConfig for value in parameters.values())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count."""
    outcomes.add(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave the counts where the command finds them."""
    # Workers of pytest-xdist collect but the controller reports.
    name = os.environ.get("PYTEST_XDIST_WORKER", "controller")
    path = Path(os.environ["CONFORMANCE_OUTCOMES"], f"{name}.json")
    path.write_text(json.dumps(vars(outcomes)))
