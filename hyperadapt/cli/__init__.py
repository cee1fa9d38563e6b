"""The command line ``hyperadapt``: from a recipe to a published adapter."""

from __future__ import annotations

import os
import sys

import typer

from hyperadapt.cli import inspection, publication, training
from hyperadapt.cli.output import FAILURE, INTERRUPTED, MISUSE, USER_ERRORS, install_warnings, report_error
from hyperadapt.recipes.recipe import RecipeError

app = typer.Typer(
    name="hyperadapt",
    help="One hypernetwork, many tasks: train, evaluate, extend, export and publish LoRA adapters.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or a wrong recipe, 130 interrupted. HYPERADAPT_TRACEBACK=1 "
    "shows where an error was raised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(training.train, training.evaluate, training.add_task, publication.generate, publication.export),
    *(publication.push, publication.card, inspection.diagnose, inspection.plot, inspection.doctor),
):
    app.command()(command)


def main() -> None:
    """Run the command line; errors that a user can mend are told in a line, without a traceback."""
    install_warnings()
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        if os.environ.get("HYPERADAPT_TRACEBACK"):
            raise
        report_error(error)
        sys.exit(MISUSE if isinstance(error, RecipeError) else FAILURE)
