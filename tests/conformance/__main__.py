"""Fetch the installed PEFT's tests, drop ``HyperAdapterConfig`` into them, and run them: `python -m tests.conformance`.

Files of PEFT's tests that are about its own methods, or about tuning parameters that are no modules, are left out.
Nothing of PEFT's tests is kept unless asked for.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("bitsandbytes", "diffusers", "PIL", "pytest", "setuptools", "sklearn", "torchao", "xdist")
COUNTED = ("passed", "skipped", "xfailed", "xpassed", "failed")


def fetch_tests(folder: Path) -> None:
    """Unpack the tests of the installed PEFT as the package ``peft_tests``."""
    requirement = f"peft=={version('peft')}"
    options = ["--quiet", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder, filter="data")
    [tests] = folder.glob("peft-*/tests")
    # Its modules import each other relatively.
    (tests / "__init__.py").touch()
    tests.rename(folder / "peft_tests")


def run_tests(folder: Path, workers: int, arguments: list[str]) -> int:
    """Run the files that have lists to replace, counting outcomes into the folder; pytest's exit code."""
    from tests.conformance.cases import MODULES
    from tests.conformance.models import fill_cache

    for name in ("hub", "home", "outcomes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "outcomes").mkdir()
    fill_cache(folder / "hub")
    environment = os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        # An address that answers at once where a test insists on the network.
        "HF_ENDPOINT": "http://localhost:9",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]),
        "CONFORMANCE_OUTCOMES": str(folder / "outcomes"),
        "OMP_NUM_THREADS": "1",
        # Without it PEFT's tests of torch.compile skip themselves.
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    files = [str(folder / "peft_tests" / f"{name}.py") for name in MODULES]
    [settings] = folder.glob("peft-*/pyproject.toml")
    options = ["-c", str(settings), "-o", "addopts=", "--rootdir", str(folder), "-p", "tests.conformance.plugin"]
    options += ["-p", "no:cacheprovider", "-q", "--no-header", "--disable-warnings", "--tb=short", "-n", str(workers)]
    # PEFT's settings make transformers' warnings errors, and PEFT's own code causes these.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        options += ["-W", f"ignore:`{name}` is deprecated:FutureWarning"]
    command = [sys.executable, "-m", "pytest", *options, *files, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def print_summary(folder: Path) -> bool:
    """Print the outcomes; whether nothing failed, something passed, and every list was found."""
    from tests.conformance.cases import LISTS, UNNAMED

    if not (folder / "controller.json").exists():
        return False
    outcomes: dict[str, Any] = json.loads((folder / "controller.json").read_text())
    # With workers, these collect, each of them everything.
    worker = folder / "gw0.json"
    collected = json.loads(worker.read_text()) if worker.exists() else outcomes
    print("\nDeselected:")
    for reason, count in sorted(collected["deselected"].items()):
        print(f"{count:>6}  {reason}")
    print("\nPEFT's own skips:")
    for reason, count in sorted(outcomes["skips"].items(), key=lambda item: -item[1]):
        print(f"{count:>6}  {reason.removeprefix('Skipped: ')}")
    expected = {f"{module}.{name}" for module, lists in LISTS.items() for name in lists} | {
        f"{module}.{test}({names})"
        for module, tests in UNNAMED.items()
        for test, lists in tests.items()
        for names in lists
    }
    missing = sorted(expected - set(collected["replaced"]))
    for name in missing:
        print(f"\nNOT FOUND in this version of PEFT's tests: {name}")
    files = outcomes["files"]
    total = {name: sum(counts.get(name, 0) for counts in files.values()) for name in COUNTED}
    print(f"\n{'file':<40}" + "".join(f"{name:>9}" for name in COUNTED))
    for file, counts in [*sorted(files.items()), ("total", total)]:
        print(f"{Path(file).name:<40}" + "".join(f"{counts.get(name, 0):>9}" for name in COUNTED))
    for failure in outcomes["failures"]:
        print(f"FAILED {failure}")
    return bool(total["passed"]) and not total["failed"] and not missing


def run(folder: Path, workers: int, arguments: list[str]) -> int:
    """Fetch, run and report; the command's exit code."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "peft_tests").exists():
        fetch_tests(folder)
    code = run_tests(folder, workers, arguments)
    passed = print_summary(folder / "outcomes")
    print(f"\nPEFT {version('peft')}, {time.monotonic() - start:.0f} seconds")
    # pytest's codes from 2 on mean that it did not run; 1 that tests failed.
    return 0 if passed and code == 0 else max(code, 1)


def main() -> int:
    """Run the command; 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Every other argument goes to pytest, for example -k test_config -x."
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: 2; 0 runs in one)")
    parser.add_argument("--cache", type=Path, help="folder to keep PEFT's tests in, outside of the repository")
    options, arguments = parser.parse_known_args()
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        install = 'pip install -c constraints.txt -e ".[test]" -r tests/conformance/requirements.txt'
        print(f"PEFT's tests need more packages ({', '.join(missing)}): {install}", file=sys.stderr)
        return 2
    if options.cache is not None:
        if options.cache.resolve().is_relative_to(ROOT):
            parser.error(f"--cache {options.cache} lies in the repository; name a folder outside of it")
        return run(options.cache.resolve() / version("peft"), options.workers, arguments)
    with tempfile.TemporaryDirectory() as temporary:
        return run(Path(temporary), options.workers, arguments)


if __name__ == "__main__":
    sys.exit(main())
