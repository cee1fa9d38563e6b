"""Result rows of benchmarks, with what is needed to compare them later."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, device, date and commit.

    Returns:
        Names and values that JSON can hold.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        **{name: version(name) for name in ("torch", "transformers", "peft", "hyperadapt")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
    }


def save_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON, the environment added to each.

    Args:
        path: The file; its folder is made.
        rows: The rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment()
    path.write_text(json.dumps([{**shared, **row} for row in rows], indent=1) + "\n")
