"""Runs every check of the repository in order and stops at the first failure: `python -m tests`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("mypy",),
    ("pydoclint.main", "--quiet", "hyperadapt", "hyperadapt_cli"),
    # The sum of the times is near a third of an hour; most tests use one core.
    ("pytest", "-n", "2"),
)


def main() -> int:
    # The tests' tensors are so small that threads only wait for one another.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for step in STEPS:
        print(f"== {' '.join(step)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *step], cwd=ROOT, env=environment, check=False).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
