"""What the commands print: results on the standard output, everything else beside it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from hyperadapt.files import finite

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text, for machines.")]
# What a user can mend. Anything else is a fault of the program and shows where it happened.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, KeyError)
# What to do before a description is relied on.
CONTROLS = (
    "controls: another task's, a blank and an unrelated description on the same rows, by evaluate --controls of a task "
    "that was added with --description and --test; rely on a description only if it is above them"
)
FAILURE, MISUSE, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Send what libraries print to the standard error, so that the standard output holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command, for machines with null for numbers that are not finite, or as text."""
    print(json.dumps(finite(result), indent=2, ensure_ascii=False) if as_json else text, flush=True)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, text to the left and numbers to the right; the first row is the head."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [isinstance(cell, int | float) for cell in rows[-1]]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def report_error(error: BaseException) -> None:
    """Say on the standard error what went wrong; and on the standard output, if that is read by a machine."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message = message or type(error).__name__
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message}}, ensure_ascii=False))


def install_warnings() -> None:
    """Have warnings printed in one line, without the place in the code that gave them."""

    def showwarning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {message}", file=sys.stderr)

    if not sys.warnoptions and not os.environ.get("PYTHONWARNINGS"):
        warnings.showwarning = showwarning
