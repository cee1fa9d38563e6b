"""Fetch the installed PEFT's tests, drop ``HyperAdapterConfig`` into them, and run them: `python -m tests.conformance`.

Needs `pip install -r tests/conformance/requirements.txt`. Nothing of PEFT's tests is kept.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conformance.cases import REPLACEMENTS

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("passed", "skipped", "xfailed", "xpassed", "failed")


def fetch_tests(folder: Path) -> None:
    """Unpack the tests of the installed PEFT as the package ``peft_tests``.

    Args:
        folder: Where to put the package.
    """
    requirement = f"peft=={version('peft')}"
    options = ["--quiet", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder, filter="data")
    [tests] = folder.glob("peft-*/tests")
    tests.rename(folder / "peft_tests")
    # Its modules import each other relatively.
    (folder / "peft_tests" / "__init__.py").touch()


def run_tests(folder: Path, workers: int, arguments: list[str]) -> int:
    """Run the files that have lists to replace, counting outcomes into the folder.

    Args:
        folder: Holds ``peft_tests``.
        workers: Number of processes.
        arguments: Further arguments of pytest.

    Returns:
        pytest's exit code.
    """
    from tests.conformance.models import fill_cache

    fill_cache(folder / "hub")
    environment = os.environ | {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]),
        "CONFORMANCE_OUTCOMES": str(folder),
        "OMP_NUM_THREADS": "1",
        # Without an address to wait for where a test insists on the network.
        "HF_ENDPOINT": "http://localhost:9",
    }
    files = [str(folder / "peft_tests" / f"{name}.py") for name in REPLACEMENTS]
    [settings] = folder.glob("peft-*/pyproject.toml")
    options = ["-c", str(settings), "-o", "addopts=", "--rootdir", str(folder), "-p", "tests.conformance.plugin"]
    # PEFT's settings make transformers' warnings errors, and PEFT's own code causes these.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        options += ["-W", f"ignore:`{name}` is deprecated:FutureWarning"]
    command = [sys.executable, "-m", "pytest", *options, "-q", "--no-header", "-n", str(workers), *files, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def print_summary(folder: Path) -> bool:
    """Print the outcomes.

    Args:
        folder: Where the plugin left them.

    Returns:
        Whether nothing failed and something passed.
    """
    outcomes: dict[str, Any] = json.loads((folder / "controller.json").read_text())
    # Every worker collects all tests.
    worker = folder / "gw0.json"
    deselected = json.loads(worker.read_text())["deselected"] if worker.exists() else outcomes["deselected"]
    print("\nDeselected:")
    for reason, count in sorted(deselected.items()):
        print(f"{count:>6}  {reason}")
    print("\nPEFT's own skips:")
    for reason, count in sorted(outcomes["skips"].items(), key=lambda item: -item[1]):
        print(f"{count:>6}  {reason.removeprefix('Skipped: ')}")
    print(f"\n{'file':<40}" + "".join(f"{name:>9}" for name in COUNTED))
    files = outcomes["files"]
    total = {name: sum(counts.get(name, 0) for counts in files.values()) for name in COUNTED}
    for file, counts in [*sorted(files.items()), ("total", total)]:
        print(f"{Path(file).name:<40}" + "".join(f"{counts.get(name, 0):>9}" for name in COUNTED))
    for failure in outcomes["failures"]:
        print(f"FAILED {failure}")
    return bool(total["passed"]) and not total["failed"]


def main() -> int:
    """Run the command.

    Returns:
        0 if nothing failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    options, arguments = parser.parse_known_args()
    if importlib.util.find_spec("diffusers") is None:
        print("PEFT's tests need more packages: pip install -r tests/conformance/requirements.txt", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch_tests(folder)
        code = run_tests(folder, options.workers, arguments)
        # pytest's codes from 2 on mean that it did not run; 1 that tests failed.
        return 0 if print_summary(folder) and code == 0 else max(code, 1)


if __name__ == "__main__":
    sys.exit(main())
