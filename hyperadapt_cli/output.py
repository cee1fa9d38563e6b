"""What the commands print: results on the standard output, everything else beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from hyperadapt_cli.flags import in_flags

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text, for machines.")]
# What a user can mend. Anything else is a fault of the program and shows where it happened.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, KeyError)
# Whose errors are those of a network, by the beginnings of their names; not all are subclasses of the above.
_HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")
# What to do before a description is relied on.
CONTROLS = (
    "controls: another task's, a blank and an unrelated description on the same rows, by evaluate --controls of a task "
    "that was added with --description and --test; rely on a description only if it is above them"
)
FAILURE, MISUSE, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def quiet_output(stage: str = "") -> Iterator[None]:
    """Send what libraries print to the standard error, so that the standard output holds the result alone.

    A stage is told there first: what follows begins with loading PyTorch, which takes seconds.
    """
    if stage:
        print(stage, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command, for machines with null for numbers that are not finite, or as text."""
    from hyperadapt.files import finite

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


def is_told(error: Exception) -> bool:
    """Whether an error is one that a user can mend, so that its message is enough."""
    return isinstance(error, USER_ERRORS) or _is_of_http(error)


def report_error(error: Exception, options: Sequence[str]) -> None:
    """Say on the standard error what went wrong; and on the standard output, if that is read by a machine.

    `options` are the flags of the command.
    """
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # Fields of a recipe are no flags, and each of its problems has a line.
    if type(error).__name__ != "RecipeError":
        message = in_flags(message, options)
    if _is_of_http(error) or any(map(_is_of_http, _causes(error))):
        message = _network_message(error, message)
    message = message or type(error).__name__
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message}}, ensure_ascii=False))


def _network_message(error: Exception, message: str) -> str:
    """In one line; without an answer, that nothing was reached."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    message = " ".join(line if line[-1] in ".:,;!?" else f"{line}." for line in lines)
    has_answer = any(getattr(one, "response", None) is not None for one in (error, *_causes(error)))
    return message if has_answer else f"The Hub cannot be reached. Check the connection. {message}".rstrip()


def _is_of_http(error: BaseException) -> bool:
    return any(kind.__module__.startswith(_HTTP_LIBRARIES) for kind in type(error).__mro__)


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


@contextlib.contextmanager
def own_words_only(options: Sequence[str]) -> Iterator[None]:
    """Have warnings of the package printed in one line, and those of other libraries left out, with their logs."""

    def showwarning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and _is_ours():
            print(f"warning: {in_flags(str(message), options)}", file=sys.stderr)

    def log(self: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno > logging.WARNING:
            logged(self, record)
        elif record.levelno == logging.WARNING and record.name.startswith("hyperadapt"):
            print(f"warning: {in_flags(record.getMessage(), options)}", file=sys.stderr)

    shown, logged = warnings.showwarning, logging.Logger.callHandlers
    logging.Logger.callHandlers = log  # type: ignore[method-assign]
    if not sys.warnoptions and not os.environ.get("PYTHONWARNINGS"):
        warnings.showwarning = showwarning
    try:
        yield
    finally:
        logging.Logger.callHandlers = logged  # type: ignore[method-assign]
        warnings.showwarning = shown


def _is_ours() -> bool:
    """Whether the package itself gives the warning that is being shown, on whosever behalf."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("hyperadapt")
