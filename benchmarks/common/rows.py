"""Result rows of benchmarks: what is needed to compare them later, and files with one compact line per row."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
SHARED = "shared"


def environment() -> Row:
    """Versions, device, date and commit, as JSON can hold them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        **{name: version(name) for name in ("torch", "transformers", "peft", "hyperadapt")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
    }


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, the environment added to each; the file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment()
    write_rows(path, [{**shared, **row} for row in rows])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines; the first line has what all rows have in common, `{"shared": {...}}`."""
    # As text, for which 1, 1.0 and True differ and NaN is itself.
    texts = [{name: _compact(value) for name, value in row.items()} for row in rows]
    shared = [name for name, text in (texts or [{}])[0].items() if all(other.get(name) == text for other in texts)]
    lines = [
        {SHARED: {name: rows[0][name] for name in shared}},
        *({name: value for name, value in row.items() if name not in shared} for row in rows),
    ]
    path.write_text("".join(f"{_compact(line)}\n" for line in lines), encoding="utf-8")


def append_row(path: Path, row: Row) -> None:
    """Add one row to a file that several processes may write to, in place of a half one that a killed process left."""
    text = json.dumps(row, allow_nan=False) + "\n"
    path.touch()
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(text.encode())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of either kind, without a half row at its end; none if there is no file."""
    if not path.exists():
        return []
    shared: Row = {}
    rows = []
    *lines, _half = path.read_bytes().split(b"\n")
    for line in lines:
        row = json.loads(line)
        if row.keys() == {SHARED}:
            shared = row[SHARED]
        else:
            rows.append(shared | row)
    return rows


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
