"""The command line ``hyperadapt``: from a recipe to a published adapter.

It stands beside the package, which loads PEFT, so that help and wrong usage are told at once.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from hyperadapt_cli import inspection, prediction, publication, starting, training
from hyperadapt_cli.output import FAILURE, INTERRUPTED, MISUSE, is_told, own_words_only, report_error

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
    *(starting.init, training.train, training.evaluate, prediction.predict, training.add_task),
    *(publication.generate, publication.export),
    *(publication.push, publication.card, inspection.diagnose, inspection.plot, inspection.doctor),
):
    # A terminal breaks the lines, and not their width in the source.
    app.command(help="\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n")))(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hyperadapt {metadata.version('hyperadapt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What all commands share; the help text is the application's."""


def main() -> None:
    """Run the command line; errors that a user can mend are told in a line, without a traceback."""
    group = typer.main.get_command(app)
    asked = getattr(group, "commands", {}).get("".join(sys.argv[1:2]))
    flags = [flag for parameter in (asked.params if asked else ()) for flag in parameter.opts if flag.startswith("--")]
    try:
        with own_words_only(flags):
            group(prog_name="hyperadapt")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("HYPERADAPT_TRACEBACK") or not is_told(error):
            raise
        report_error(error, flags)
        # By name: an error that comes early must not load the package.
        sys.exit(MISUSE if type(error).__name__ == "RecipeError" else FAILURE)
