"""Run the tests with the oldest or newest versions that ``pyproject.toml`` allows: `python -m tests.versions oldest`.

Makes a new virtual environment; further arguments go to pytest. Optional packages (Triton, quantisation) are left out,
and their tests with them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "pytest-xdist", "scikit-learn", "hypothesis")


def oldest(requirements: list[Requirement]) -> list[str]:
    """Pins at the lower bounds.

    Args:
        requirements: The package's requirements.

    Returns:
        A pin for each.
    """
    bounds = {one.name: [spec.version for spec in one.specifier if spec.operator == ">="] for one in requirements}
    return [f"{name}=={version}" for name, [version] in bounds.items()]


def main() -> int:
    """Run the command.

    Returns:
        pytest's exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", choices=("oldest", "newest"))
    options, arguments = parser.parse_known_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(one) for one in project["dependencies"]]
    wanted = oldest(requirements) if options.versions == "oldest" else [str(one) for one in requirements]
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(temporary, with_pip=True)
        python = str(Path(temporary, "bin", "python"))
        for packages in ((*wanted, *TOOLS), ("--no-deps", "--editable", str(ROOT))):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        subprocess.run([python, "-m", "pip", "list"], check=True)
        ignored = ("--ignore", "tests/examples", "--ignore", "tests/benchmarks")
        # An older release deprecates what a newer one removed, so only failures count here.
        tests = ["-m", "pytest", "-W", "default", "tests", *ignored, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([python, *tests], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
